"""A block undoes its effect on exit, wherever a signal handler raises."""

import gc
import signal
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from fastema.engine.blocks import BlockSteps, RestoringBlock
from fastema.engine.collector import pause_gc

from ..faults.interrupts import TOGETHER, interrupt_everywhere


class Swapped:
    """Weights that a block replaces by "average", and a record of the calls."""

    def __init__(self) -> None:
        self.weights, self.calls = "raw", list[str]()

    def block(self) -> RestoringBlock[str]:
        def apply() -> str:
            self.calls.append("apply")
            assert self.weights == "raw"
            self.weights = "average"
            return self.weights

        def restore() -> None:
            self.calls.append("restore")
            assert self.weights == "average"
            self.weights = "raw"

        def verify() -> None:
            self.calls.append("verify")

        return RestoringBlock(lambda: BlockSteps(apply, restore, verify))


def enter_and_exit(swapped: Swapped) -> None:
    with swapped.block() as value:
        assert value == swapped.weights == "average"


def raise_inside(swapped: Swapped) -> None:
    try:
        with swapped.block():
            raise LookupError
    except LookupError:
        pass


def close_by_hand(swapped: Swapped) -> None:
    block = swapped.block()
    try:
        block.__enter__()
    finally:
        block.close()


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([], id="Ctrl-C"),
        pytest.param([signal.SIGTERM], id="and SIGTERM", marks=TOGETHER),
    ],
)
@pytest.mark.parametrize("use", [enter_and_exit, raise_inside, close_by_hand])
def test_block_restores_once_when_signals_arrive_at_any_place(
    use: Callable[[Swapped], None], others: list[int]
) -> None:
    swapped = Swapped()

    def check() -> None:
        assert swapped.weights == "raw"
        assert swapped.calls[:2] in ([], ["apply", "restore"])
        assert swapped.calls[2:] in ([], ["verify"])
        swapped.calls.clear()

    interrupt_everywhere(lambda: use(swapped), check, others)


def test_signals_during_restore_are_handled_after_it() -> None:
    weights = ["raw"]

    def restore() -> None:
        signal.raise_signal(signal.SIGINT)
        weights[:] = ["raw"]

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (
            pytest.raises(KeyboardInterrupt),
            RestoringBlock(lambda: BlockSteps(lambda: weights.clear(), restore)),
        ):
            assert not weights
    finally:
        signal.signal(signal.SIGINT, handler)
    assert weights == ["raw"]


def test_restore_runs_after_apply_raised_and_verify_does_not() -> None:
    calls: list[str] = []

    def fail() -> None:
        calls.append("apply")
        raise LookupError

    block = RestoringBlock(
        lambda: BlockSteps(fail, lambda: calls.append("restore"), lambda: calls.append("verify"))
    )
    with pytest.raises(LookupError), block:
        pass
    block.close()
    assert calls == ["apply", "restore"]


def test_verify_runs_only_if_the_body_raised_nothing() -> None:
    swapped = Swapped()
    enter_and_exit(swapped)
    assert swapped.calls == ["apply", "restore", "verify"]
    swapped.calls.clear()
    with pytest.raises(LookupError), swapped.block():
        raise LookupError
    assert swapped.calls == ["apply", "restore"]


def test_error_of_verify_leaves_the_block() -> None:
    def verify() -> None:
        raise LookupError

    block = RestoringBlock(lambda: BlockSteps(lambda: None, lambda: None, verify))
    with pytest.raises(LookupError), block:
        pass


def test_error_of_restore_leaves_the_block_and_restore_is_not_repeated() -> None:
    calls: list[str] = []

    def fail() -> None:
        calls.append("restore")
        raise LookupError

    block = RestoringBlock(lambda: BlockSteps(lambda: None, fail))
    with pytest.raises(LookupError), block:
        pass
    assert calls == ["restore"]


def test_block_cannot_be_entered_twice() -> None:
    swapped = Swapped()
    block = swapped.block()
    with block, pytest.raises(RuntimeError, match="already entered"):
        block.__enter__()
    with pytest.raises(RuntimeError, match="already entered"), block:
        pass
    assert swapped.calls == ["apply", "restore", "verify"]


def test_block_that_is_kept_does_not_keep_what_it_restored() -> None:
    raw: list[weakref.ref[Swapped]] = []

    def prepare() -> BlockSteps[Swapped]:
        swapped = Swapped()
        raw.append(weakref.ref(swapped))
        return BlockSteps(lambda: swapped, lambda: swapped)

    block = RestoringBlock(prepare)
    with block:
        assert raw[0]() is not None
    gc.collect()
    assert raw[0]() is None


def test_block_works_in_an_exit_stack_and_as_a_decorator() -> None:
    swapped = Swapped()
    with ExitStack() as stack:
        assert stack.enter_context(swapped.block()) == "average"
        assert swapped.weights == "average"
    assert swapped.weights == "raw"

    @swapped.block()
    def read() -> str:
        return swapped.weights

    assert [read(), read(), swapped.weights] == ["average", "average", "raw"]


@pytest.mark.parametrize("enabled", [True, False])
def test_collector_is_paused_and_set_back_wherever_a_signal_arrives(
    enabled: bool,
) -> None:
    @pause_gc
    def count(up_to: int, *, fail: bool = False) -> Any:
        assert not gc.isenabled()
        if fail:
            raise LookupError
        return [nested() for _ in range(up_to)]

    @pause_gc
    def nested() -> bool:
        return gc.isenabled()

    def call() -> None:
        assert count(8) == [False] * 8
        with pytest.raises(LookupError):
            count(0, fail=True)

    def check() -> None:
        assert gc.isenabled() is enabled

    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        interrupt_everywhere(call, check)
    finally:
        (gc.enable if before else gc.disable)()
