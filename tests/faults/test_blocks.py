"""Blocks that restore: whatever raises, and at every place where Python delivers a signal."""

import contextlib
import sys
from typing import Any

import pytest

from fastema.engine.blocks import RestoringBlock, Steps

from .interrupts import every_place


class Held:
    """Something that is swapped in and has to come out again."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @property
    def inside(self) -> bool:
        return self.calls.count("apply") > self.calls.count("restore")

    def block(self, **changes: Any) -> RestoringBlock[str]:
        def apply() -> str:
            self.calls.append("apply")
            return "value"

        calls = {"apply": apply, "restore": lambda: self.calls.append("restore"), **changes}
        return RestoringBlock(lambda: Steps(**calls))


def fail() -> Any:
    raise ValueError("planted")


# The step that fails, and the calls that were made.
FAILING = {"apply": ["restore"], "restore": ["apply"], "verify": ["apply", "restore"]}


@pytest.mark.parametrize("step", FAILING)
def test_failed_step_is_raised_after_one_restore(step: str) -> None:
    held = Held()
    with pytest.raises(ValueError, match="planted"), held.block(**{step: fail}):
        pass
    assert held.calls == FAILING[step]


def test_exception_in_the_block_comes_out_after_the_restore_and_without_verification() -> None:
    held = Held()
    with pytest.raises(StopIteration), held.block(verify=fail):
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


@pytest.mark.parametrize("times", [1, 3])
def test_it_is_restored_wherever_interrupts_come_where_they_are_handled(times: int) -> None:
    held, entered = Held(), []

    def block() -> None:
        try:
            with held.block():
                entered.append(held.inside)
        finally:
            assert not held.inside

    every_place(block, held.calls.clear, times)
    assert entered
    assert all(entered)
