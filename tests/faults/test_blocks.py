"""Blocks that restore: at every place where Python delivers a signal, and under timers."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Any

import pytest

from fastema.engine.blocks import RestoringBlock, Steps

from .interrupts import At, every_place


class Held:
    """Something that is swapped in and has to come out again."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @property
    def inside(self) -> bool:
        return self.calls.count("apply") > self.calls.count("restore")

    def steps(self, **changes: Any) -> Steps[str]:
        def apply() -> str:
            self.calls.append("apply")
            return "value"

        calls = {"apply": apply, "restore": lambda: self.calls.append("restore"), **changes}
        return Steps(**calls)

    def block(self, **changes: Any) -> RestoringBlock[str]:
        return RestoringBlock(lambda: self.steps(**changes))


def fail(message: str) -> Any:
    raise ValueError(message)


# Steps that fail, the error that comes out, and the calls that were made.
FAILING: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "apply": ({"apply": lambda: fail("half way")}, "half way", ["restore"]),
    "restore": ({"restore": lambda: fail("gone")}, "gone", ["apply"]),
    "verify": ({"verify": lambda: fail("written")}, "written", ["apply", "restore"]),
}


@pytest.mark.parametrize("step", FAILING)
def test_failed_step_is_raised_after_one_restore(step: str) -> None:
    changes, words, calls = FAILING[step]
    held = Held()
    with pytest.raises(ValueError, match=words), held.block(**changes):
        pass
    assert held.calls == calls
    with pytest.raises(ValueError, match="checks"), RestoringBlock(lambda: fail("checks")):
        pass


def test_exception_in_the_block_comes_out_after_the_restore_and_without_verification() -> None:
    held = Held()
    with pytest.raises(StopIteration), held.block(verify=lambda: fail("not reached")):
        raise StopIteration
    assert held.calls == ["apply", "restore"]


def test_block_serves_once_in_a_stack_and_as_a_decorator() -> None:
    held = Held()
    block = held.block()
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(block) == "value"
        assert held.inside
        with pytest.raises(RuntimeError, match="entered before"), block:
            pass

    @held.block()
    def nested(depth: int) -> None:
        if depth:
            nested(depth - 1)

    nested(2)
    assert held.calls == ["apply", "restore"] + ["apply"] * 3 + ["restore"] * 3


def test_abandoned_block_restores_when_it_is_freed_and_a_used_one_keeps_nothing_alive() -> None:
    held = Held()
    block = held.block()
    block.__enter__()
    assert held.inside
    del block
    assert not held.inside
    used, before = held.block(), sys.getrefcount(held)
    with used:
        pass
    assert sys.getrefcount(held) == before


# -- signals --------------------------------------------------------------------------------------


class seen_by_handlers:
    """What an ``except`` clause around the block sees, while the exception is still there."""

    def __init__(self, held: Held) -> None:
        self.held = held

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        if self.held.inside:
            pytest.fail("the average is still there where the exception is handled")


def test_interrupted_at_every_place() -> None:
    held, entered = Held(), []

    def block() -> None:
        with seen_by_handlers(held), held.block():
            entered.append(held.inside)

    def check() -> None:
        assert not held.inside
        held.calls.clear()

    every_place(block, check)
    assert entered
    assert all(entered)


class Again(At):
    """A tracer that interrupts at the k-th place and at the two that follow."""

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        before, result = self.left, super().__call__(frame, event, argument)
        if before in (0, -1) and self.left == before - 1:
            signal.raise_signal(signal.SIGINT)
        return result


def test_three_interrupts_in_a_row_are_outlasted() -> None:
    held = Held()
    short = 0
    for k in range(1, 500):
        tracer = Again(k)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            with seen_by_handlers(held), held.block():
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
            signal.signal(signal.SIGINT, handler)
        short += tracer.left <= -2
    assert 0 < short < 499
