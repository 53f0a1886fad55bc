"""Update an average from optimizer hooks, once after all optimizers have stepped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastema.errors import ArgumentError

__all__ = ["StepHooks"]

_HOOK = "register_step_post_hook"


class StepHooks:
    """Calls ``update(steps)`` once whenever all given optimizers have stepped.

    Parameters
    ----------
    optimizers : sequence of torch.optim.Optimizer
    update : function
        Called with the number of steps since its previous call.
    update_if : function, optional
        Returns whether to average the weights of a step; a skipped step counts in the next update.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        update: Callable[[int], None],
        update_if: Callable[[], bool] | None,
    ) -> None:
        found = [_unwrap_optimizer(one) for one in optimizers]
        if not found or len({id(one) for one in found}) < len(found):
            raise ArgumentError(
                f"follow() was given {len(found)} optimizers, expected at least one, and each once"
            )
        self._update, self._update_if = update, update_if
        self._all = frozenset(range(len(found)))
        self._waiting, self._steps = set(self._all), 0
        self._handles = [
            getattr(one, _HOOK)(self._hook(number)) for number, one in enumerate(found)
        ]

    def _hook(self, number: int) -> Callable[..., None]:
        def stepped(optimizer: Any, *_: Any) -> None:
            # With GradScaler, a fused optimizer decides on the device whether it steps.
            found_inf = getattr(optimizer, "found_inf", None)
            if found_inf is None or not float(found_inf):
                self._count_step(number)

        return stepped

    def _count_step(self, number: int) -> None:
        self._waiting.discard(number)
        if self._waiting:
            return
        self._waiting = set(self._all)
        self._steps += 1
        if self._update_if is None or self._update_if():
            steps, self._steps = self._steps, 0
            self._update(steps)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _unwrap_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer inside the wrappers of Lightning and Accelerate."""
    while hasattr(getattr(optimizer, "optimizer", None), "step"):
        optimizer = optimizer.optimizer
    if not callable(getattr(optimizer, _HOOK, None)):
        raise ArgumentError(
            f"follow() was given a {type(optimizer).__name__}: expected optimizers of torch.optim, "
            "or subclasses of them; with others call update() after each step"
        )
    return optimizer
