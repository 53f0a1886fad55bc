"""Signals that arrive while tensors are half written: later, all of them, and nothing changed."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest

import fastema
from fastema.engine import interrupts
from fastema.engine.interrupts import defer_signals

if not hasattr(signal, "SIGUSR1"):
    pytest.skip("no signals of the user's own here", allow_module_level=True)

ONE, TWO = signal.SIGUSR1, signal.SIGUSR2

Handler = Callable[[int, FrameType | None], Any]


@pytest.fixture(autouse=True)
def handlers_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (ONE, TWO, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def calls() -> list[int]:
    return []


@pytest.fixture
def noting(calls: list[int]) -> Handler:
    return lambda number, frame: calls.append(number)


def update() -> None:
    weights = {"w": np.random.default_rng(3).normal(size=100)}
    ema = fastema.EMA(weights, decay=0.9)
    weights["w"] += 1
    ema.update()


def action(number: int) -> tuple[int | None, int]:
    """What the system does on a signal: the function and the flags."""
    now = interrupts._Action()
    ctypes.CDLL(None).sigaction(number, None, ctypes.byref(now))
    return now.function, now.flags


def test_handlers_run_when_the_block_is_over(calls: list[int], noting: Handler) -> None:
    signal.signal(ONE, noting)
    with defer_signals():
        signal.raise_signal(ONE)
        signal.raise_signal(ONE)
        assert calls == []
    assert calls == [ONE, ONE]
    assert signal.getsignal(ONE) is noting


def test_a_handler_that_raises_drops_no_other_signal(calls: list[int]) -> None:
    def raising(number: int, frame: FrameType | None) -> None:
        calls.append(number)
        raise {ONE: RuntimeError, TWO: SystemExit}.get(number, OSError)(number)

    for number in (ONE, TWO, signal.SIGTERM):
        signal.signal(number, raising)

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
        assert signal.getsignal(number) is raising


def test_a_handler_that_returns_leaves_the_exception_of_another_one(
    calls: list[int], noting: Handler
) -> None:
    def raising(number: int, frame: FrameType | None) -> None:
        raise RuntimeError(number)

    signal.signal(ONE, raising)
    signal.signal(TWO, noting)

    def block() -> None:
        with defer_signals():
            signal.raise_signal(ONE)
            signal.raise_signal(TWO)

    with pytest.raises(RuntimeError):
        block()
    assert calls == [TWO]


def test_a_signal_during_a_late_handler_is_handled_at_once(calls: list[int]) -> None:
    def second(number: int, frame: FrameType | None) -> None:
        calls.append(number)

    def first(number: int, frame: FrameType | None) -> None:
        with defer_signals():
            signal.raise_signal(TWO)
        calls.append(number)

    signal.signal(ONE, first)
    signal.signal(TWO, second)
    with defer_signals():
        signal.raise_signal(ONE)
    assert calls == [TWO, ONE]


def test_what_waits_is_handled_after_the_handler_before_it(calls: list[int]) -> None:
    def saving(number: int, frame: FrameType | None) -> None:
        update()
        calls.append(number)

    signal.signal(ONE, saving)
    signal.signal(TWO, lambda number, frame: calls.append(number))
    with defer_signals():
        signal.raise_signal(ONE)
        signal.raise_signal(TWO)
    assert calls == [ONE, TWO]


def test_inner_blocks_wait_for_the_outermost(calls: list[int], noting: Handler) -> None:
    signal.signal(ONE, noting)
    with defer_signals():
        with defer_signals():
            signal.raise_signal(ONE)
        update()
        signal.raise_signal(ONE)
        assert calls == []
    assert calls == [ONE, ONE]
    assert signal.getsignal(ONE) is noting


def test_a_handler_set_in_the_block_stays_and_is_called(calls: list[int], noting: Handler) -> None:
    signal.signal(ONE, lambda number, frame: calls.append(-number))
    with defer_signals():
        signal.raise_signal(ONE)
        signal.signal(ONE, noting)
    assert signal.getsignal(ONE) is noting
    assert calls == [ONE]


def test_a_signal_that_a_handler_has_ignored_is_ignored(calls: list[int]) -> None:
    def once(number: int, frame: FrameType | None) -> None:
        calls.append(number)
        signal.signal(number, signal.SIG_IGN)

    signal.signal(ONE, once)
    with defer_signals():
        signal.raise_signal(ONE)
        signal.raise_signal(ONE)
    assert calls == [ONE]
    assert signal.getsignal(ONE) is signal.SIG_IGN


def test_what_was_found_in_a_block_still_calls_the_handler(
    calls: list[int], noting: Handler
) -> None:
    signal.signal(ONE, noting)
    with defer_signals():
        found = signal.signal(ONE, signal.SIG_IGN)
    signal.signal(ONE, found)
    signal.raise_signal(ONE)
    assert calls == [ONE]
    update()
    signal.raise_signal(ONE)
    assert calls == [ONE, ONE]


def raising(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_block_interrupted_twice_as_it_begins_holds_nothing_back(
    calls: list[int], noting: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(ONE, noting)
    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "_sigaction", raising)
        for method in ("__exit__", "_release"):
            patch.setattr(defer_signals, method, raising)
        with pytest.raises(KeyboardInterrupt):
            defer_signals().__enter__()
    signal.raise_signal(ONE)
    assert calls == [ONE]


def test_a_block_interrupted_as_it_ends_holds_nothing_back(
    calls: list[int], noting: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(ONE, noting)
    block = defer_signals()
    block.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(defer_signals, "_restore_handlers", raising)
        patch.setattr(defer_signals, "_release", lambda self: self._restore_handlers())
        with pytest.raises(KeyboardInterrupt):
            block.__exit__()
    signal.raise_signal(ONE)
    assert calls == [ONE]
    with defer_signals():
        signal.raise_signal(ONE)
        assert calls == [ONE]
    assert calls == [ONE, ONE]
    assert signal.getsignal(ONE) is noting


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_signals_without_a_python_handler_are_left_alone(handler: signal.Handlers) -> None:
    signal.signal(ONE, handler)
    before = action(ONE)
    with defer_signals():
        assert signal.getsignal(ONE) is handler
        assert action(ONE) == before
    assert signal.getsignal(ONE) is handler
    assert action(ONE) == before


def test_a_block_of_another_thread_holds_nothing_back(calls: list[int], noting: Handler) -> None:
    signal.signal(ONE, noting)
    inside, over = threading.Event(), threading.Event()

    def block() -> None:
        with defer_signals():
            inside.set()
            assert over.wait(20)

    thread = threading.Thread(target=block)
    thread.start()
    assert inside.wait(20)
    signal.raise_signal(ONE)
    assert calls == [ONE]
    over.set()
    thread.join()


linux = pytest.mark.skipif(sys.platform != "linux", reason="sigaction is read on Linux only")


@linux
def test_updates_leave_a_handler_of_faulthandler_in_place(
    calls: list[int], noting: Handler
) -> None:
    signal.signal(ONE, noting)
    with tempfile.TemporaryFile() as file:

        def dumps() -> int:
            return os.pread(file.fileno(), 1 << 20, 0).count(b"most recent call first")

        faulthandler.register(ONE, file=file, all_threads=False, chain=True)
        try:
            before = action(ONE)
            update()
            assert action(ONE) == before
            signal.raise_signal(ONE)
            assert (dumps(), calls) == (1, [ONE])
            with defer_signals():
                signal.raise_signal(ONE)
                assert (dumps(), calls) == (2, [ONE])
            assert calls == [ONE, ONE]
            assert action(ONE) == before
        finally:
            faulthandler.unregister(ONE)
    update()
    signal.raise_signal(ONE)
    assert calls == [ONE] * 3


@linux
def test_updates_leave_system_calls_restarting(noting: Handler) -> None:
    signal.signal(ONE, noting)
    plain = action(ONE)
    signal.siginterrupt(ONE, False)
    restarting = action(ONE)
    assert restarting != plain
    update()
    assert action(ONE) == restarting
