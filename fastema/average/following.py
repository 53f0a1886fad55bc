"""Update an average from optimizer hooks, once after all optimizers have stepped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastema.errors import ArgumentError

__all__ = ["StepHooks"]

_HOOKS = "_optimizer_step_post_hooks"


class StepHooks:
    """Calls ``stepped()`` after each step of all given optimizers together.

    The step of the last one ends the common step. It counts if every other one has stepped since
    the last one's previous step; otherwise one of them was skipped, and the next common step
    begins.
    """

    def __init__(self, optimizers: Sequence[Any], stepped: Callable[[], None]) -> None:
        found = [_hooked_optimizer(one) for one in optimizers]
        if not found or len({id(one) for one in found}) < len(found):
            raise ArgumentError(
                f"follow() was given {len(found)} optimizers, expected at least one, and each once"
            )
        self._stepped, self._count = stepped, len(found)
        self._done: set[int] = set()
        self._handles: list[Any] = []
        for number, one in enumerate(found):
            self._follow(number, one)

    def _follow(self, number: int, optimizer: Any) -> None:
        # A step() that calls super().step() runs all hooks twice: its class and its base class
        # each have a step() that runs them. The step is over after the outermost one.
        classes = type(optimizer).__mro__
        deepest = sum(getattr(vars(kind).get("step"), "hooked", False) for kind in classes)
        depth = 0

        def begin(*_: Any) -> None:
            nonlocal depth
            depth = min(depth + 1, deepest)  # a step that raised did not end

        def end(optimizer: Any, *_: Any) -> None:
            nonlocal depth
            depth -= 1
            # With GradScaler, a fused optimizer decides on the device whether it steps.
            found_inf = getattr(optimizer, "found_inf", None)
            if depth <= 0 and (found_inf is None or not float(found_inf)):
                depth = 0
                self._count_step(number)

        self._handles.append(optimizer.register_step_pre_hook(begin))
        self._handles.append(optimizer.register_step_post_hook(end))

    def _count_step(self, number: int) -> None:
        self._done.add(number)
        if number < self._count - 1:
            return
        complete = len(self._done) == self._count
        self._done.clear()
        if complete:
            self._stepped()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


_PASSING_ON = {"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"}
"""Wrapper classes whose ``step()`` writes no weights besides the optimizer inside.

Accelerate's also skips steps, so that only the hooks inside tell that there was one.
"""


def _hooked_optimizer(optimizer: Any) -> Any:
    """Return the optimizer whose hooks run after all writes of one step.

    Other wrappers (Lookahead, post-local SGD) may write weights after the optimizer inside has
    stepped: their own hooks must run.
    """
    while _PASSING_ON & {kind.__name__ for kind in type(optimizer).__mro__}:
        optimizer = optimizer.optimizer
    kind = type(optimizer)
    # Both come from torch's Optimizer.__init__: without the first, no hook can be registered;
    # without the second, step() runs none.
    if _HOOKS in getattr(optimizer, "__dict__", {}) and getattr(kind.step, "hooked", False):
        return optimizer
    if callable(getattr(optimizer, "step", None)) and not isinstance(optimizer, type):
        raise ArgumentError(
            f"follow() was given a {kind.__name__}, whose step() runs no hooks of "
            "register_step_post_hook(): call update() after each of its steps instead. To follow "
            "an optimizer inside of it would miss what it writes afterwards"
        )
    raise ArgumentError(
        f"follow() was given a {kind.__name__}: expected optimizers of torch.optim, or subclasses "
        "of them; several as follow(first, second)"
    )
