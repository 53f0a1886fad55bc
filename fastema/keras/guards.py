"""Guards that give a model its weights back when no callback is called any more."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

__all__ = [
    "ErrorGuard",
    "UseGuard",
    "WeightGuard",
    "guard_use",
    "is_end_of_data",
    "is_running",
    "refuse_writes",
]


_USES: Final = (
    "evaluate",
    "predict",
    "save",
    "save_weights",
    "load_weights",
    "get_weights",
    "set_weights",
)
"""Methods of a model that read or write its weights, besides those that train it."""


def is_running(model: Any, *names: str) -> bool:
    """Return whether this is called from within one of the model's methods, by a callback perhaps.

    Keras keeps no note of that, and a call that raised ends without a word to its callbacks.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in names and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_end_of_data(error: BaseException) -> bool:
    """Return whether an error is no failure: iterators of JAX end so, and those of TensorFlow."""
    return isinstance(error, StopIteration) or type(error).__name__ == "OutOfRangeError"


class WeightGuard:
    """Stands in for a method of an object, until it is removed."""

    def __init__(self, of: Any, name: str) -> None:
        self._of, self._name = of, name
        self._own = name in vars(of)
        self._inner = getattr(of, name)
        vars(of)[name] = self  # unseen by Keras, which tracks what is set

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        raise NotImplementedError

    def remove(self) -> None:
        """Give the object its own method back, unless it was given another meanwhile."""
        if vars(self._of).get(self._name) is not self:
            return
        if self._own:
            vars(self._of)[self._name] = self._inner
        else:
            del vars(self._of)[self._name]


class ErrorGuard(WeightGuard):
    """Gives the weights back where the method raises."""

    def __init__(self, of: Any, name: str, restore: Callable[[], None]) -> None:
        super().__init__(of, name)
        self._restore = restore

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        try:
            return self._inner(*args, **kwargs)
        except BaseException as error:
            if not is_end_of_data(error):
                self._restore()
            raise


class UseGuard(WeightGuard):
    """Gives the weights back before the method is called, ``unless`` it may see them as they are.

    ``restore`` also removes this guard, or raises.
    """

    def __init__(
        self,
        of: Any,
        name: str,
        restore: Callable[[], None],
        unless: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(of, name)
        self._restore, self._unless = restore, unless

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        if self._unless():
            return self._inner(*args, **kwargs)
        self._restore()
        return getattr(self._of, self._name)(*args, **kwargs)


def guard_use(model: Any, restore: Callable[[], None]) -> list[WeightGuard]:
    """Give the weights back if the model is used again after a call that raised.

    Within the call that put the average into the model, other callbacks evaluate, save and write
    the average. Training never sees it.
    """
    within = partial(is_running, model, "fit", "evaluate", "predict")
    training = [UseGuard(model, name, restore) for name in ("fit", "train_on_batch")]
    return [*training, *(UseGuard(model, name, restore, within) for name in _USES)]


def refuse_writes(model: Any, refuse: Callable[[str], None]) -> list[WeightGuard]:
    """Refuse what would train or overwrite the average in a model; ``refuse(method)`` raises."""
    names = ("fit", "train_on_batch", "load_weights", "set_weights")
    return [UseGuard(model, name, partial(refuse, name)) for name in names]
