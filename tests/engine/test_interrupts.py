"""Signals that arrive during writes are all handled afterwards, and handlers stay installed."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest

import fastema
from fastema.engine import interrupts
from fastema.engine.interrupts import defer_signals

from ..faults.interrupts import TOGETHER, interrupt_everywhere

if not hasattr(signal, "SIGUSR1"):
    pytest.skip("no signals of the user's own here", allow_module_level=True)

ONE, TWO = signal.SIGUSR1, signal.SIGUSR2

Handler = Callable[[int, FrameType | None], Any]


@pytest.fixture(autouse=True)
def restore_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (ONE, TWO, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def calls() -> list[int]:
    """Return the list of handled signals."""
    return []


@pytest.fixture
def recorder(calls: list[int]) -> Handler:
    """Install and return a handler of `ONE` that appends to `calls`."""

    def record(number: int, frame: FrameType | None) -> None:
        calls.append(number)

    signal.signal(ONE, record)
    return record


def update_average() -> None:
    weights = {"w": np.random.default_rng(3).normal(size=100)}
    ema = fastema.EMA(weights, decay=0.9)
    weights["w"] += 1
    ema.update()


def test_a_handler_that_raises_drops_no_other_signal(calls: list[int]) -> None:
    def failing(number: int, frame: FrameType | None) -> None:
        calls.append(number)
        raise {ONE: RuntimeError, TWO: SystemExit}.get(number, OSError)(number)

    for number in (ONE, TWO, signal.SIGTERM):
        signal.signal(number, failing)

    def block() -> None:
        with defer_signals():
            for number in (ONE, signal.SIGTERM, TWO, ONE):
                signal.raise_signal(number)

    with pytest.raises(RuntimeError) as raised:
        block()
    assert calls == [ONE, signal.SIGTERM, TWO, ONE]
    kinds, error = [], raised.value
    while error is not None:
        kinds.append(type(error))
        error = error.__context__
    assert kinds == [RuntimeError, SystemExit, OSError, RuntimeError]
    for number in (ONE, TWO, signal.SIGTERM):
        assert signal.getsignal(number) is failing


def test_a_handler_that_updates_an_average_finishes_before_the_next_one(calls: list[int]) -> None:
    """A signal raised while the handler runs is handled at once."""

    def saving(number: int, frame: FrameType | None) -> None:
        update_average()
        if not calls:
            with defer_signals():
                signal.raise_signal(signal.SIGTERM)
        calls.append(number)

    signal.signal(ONE, saving)
    for number in (TWO, signal.SIGTERM):
        signal.signal(number, lambda number, frame: calls.append(number))
    with defer_signals():
        signal.raise_signal(ONE)
        signal.raise_signal(TWO)
    assert calls == [signal.SIGTERM, ONE, TWO]


def test_a_handler_that_was_saved_inside_a_block_and_set_after_it_still_works(
    calls: list[int], recorder: Handler
) -> None:
    with defer_signals():
        saved = signal.getsignal(ONE)
    signal.signal(ONE, saved)
    signal.raise_signal(ONE)
    assert calls == [ONE]
    with defer_signals():
        signal.raise_signal(ONE)
        assert calls == [ONE]
    assert calls == [ONE, ONE]
    assert signal.getsignal(ONE) is recorder


def test_recorded_signals_are_handled_wherever_another_handler_raises(
    calls: list[int], recorder: Handler
) -> None:
    """Also while the handlers are put back."""

    def block() -> None:
        with defer_signals():
            entered.append(True)
            signal.raise_signal(ONE)

    entered: list[bool] = []
    handlers = {number: signal.getsignal(number) for number in (ONE, signal.SIGTERM)}

    def check() -> None:
        assert len(calls) == len(entered)
        assert {number: signal.getsignal(number) for number in handlers} == handlers
        calls.clear()
        entered.clear()

    interrupt_everywhere(block, check)


@TOGETHER
def test_handlers_are_put_back_wherever_two_of_them_raise(recorder: Handler) -> None:
    """At the latest by the next block."""

    def block() -> None:
        with defer_signals():
            pass

    def check() -> None:
        block()
        assert signal.getsignal(ONE) is recorder
        assert {number: signal.getsignal(number) for number in before} == before

    def first_block() -> None:
        interrupts._handlers.clear()
        block()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupt_everywhere(first_block, check, [signal.SIGTERM])


def test_handler_that_another_signal_installs_as_a_block_begins_stays(
    calls: list[int], recorder: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_after_signal(number: int, handler: Any) -> Any:
        if number == ONE and not installed:
            installed.append(True)
            signal.signal(ONE, other)  # as its own handler may: signal.signal() runs handlers first
        return signal.signal(number, handler)

    def other(number: int, frame: FrameType | None) -> None:
        calls.append(-number)

    installed: list[bool] = []
    monkeypatch.setattr(interrupts, "_set", set_after_signal)
    with defer_signals():
        signal.raise_signal(ONE)
    assert calls == [-ONE]
    assert signal.getsignal(ONE) is other


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of JAX, if it was imported
def test_signals_are_not_deferred_in_a_child_that_another_thread_forked(
    calls: list[int], recorder: Handler
) -> None:
    children: list[int] = []

    def fork() -> None:
        child = os.fork()
        if child:
            children.append(child)
            return
        signal.raise_signal(ONE)
        os._exit(0 if calls == [ONE] and signal.getsignal(ONE) is recorder else 1)

    with defer_signals():
        signal.raise_signal(ONE)  # for the parent alone
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    assert os.waitpid(children[0], 0)[1] == 0
    assert calls == [ONE]
    assert signal.getsignal(ONE) is recorder


def test_nested_blocks_and_other_threads_defer_to_the_outermost(
    calls: list[int], recorder: Handler
) -> None:
    def block() -> None:
        with defer_signals():
            pass

    with defer_signals():
        thread = threading.Thread(target=block)
        with defer_signals():
            signal.raise_signal(ONE)
            thread.start()
            thread.join()
        assert calls == []
    assert calls == [ONE]


def test_handler_that_is_set_inside_a_block_stays(calls: list[int], recorder: Handler) -> None:
    def other(number: int, frame: FrameType | None) -> None:
        calls.append(-number)

    with defer_signals():
        signal.raise_signal(ONE)
        signal.signal(ONE, other)
    assert calls == [-ONE]
    assert signal.getsignal(ONE) is other
