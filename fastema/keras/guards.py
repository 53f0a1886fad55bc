"""Guards that restore a model's weights when Keras no longer calls its callbacks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, Final

import keras

__all__ = [
    "ErrorGuard",
    "MethodGuard",
    "UseGuard",
    "find_callbacks",
    "guard_use",
    "guard_writes",
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
"""Methods of a model that read or write its weights, except those that train it."""


def is_running(model: Any, *names: str) -> bool:
    """Return whether one of the model's methods with these names is on the call stack.

    Keras does not record that, and does not notify callbacks of a call that raises.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in names and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def find_callbacks() -> list[Any]:
    """Return all callbacks in the order of their calls; an empty list if it is unknown.

    Callbacks do not know each other, but the list that calls them is on the call stack.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return list(caller.callbacks)
        frame = frame.f_back
    return []


def is_end_of_data(error: BaseException) -> bool:
    """Return whether an error only ends the data, as with iterators of JAX and TensorFlow."""
    return isinstance(error, StopIteration) or type(error).__name__ == "OutOfRangeError"


class MethodGuard:
    """Replaces a method of an object until :meth:`remove` is called."""

    def __init__(self, of: Any, name: str) -> None:
        self._of, self._name = of, name
        self._was_replaced = name in vars(of)
        self._inner = getattr(of, name)
        vars(of)[name] = self  # bypasses Keras's __setattr__, which tracks attributes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        raise NotImplementedError

    def remove(self) -> None:
        """Restore the object's own method, unless something else has replaced it since."""
        if vars(self._of).get(self._name) is not self:
            return
        if self._was_replaced:
            vars(self._of)[self._name] = self._inner
        else:
            del vars(self._of)[self._name]


class ErrorGuard(MethodGuard):
    """Restores the weights if the method raises."""

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


class UseGuard(MethodGuard):
    """Restores the weights before the method is called, except when ``unless()`` is true.

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


def guard_use(model: Any, restore: Callable[[], None]) -> list[MethodGuard]:
    """Install guards that restore the weights if the model is used after a call that raised.

    Within the call that put the average into the model, other callbacks evaluate, save and write
    the average. Training always starts with the weights.
    """
    within = partial(is_running, model, "fit", "evaluate", "predict")
    training = [UseGuard(model, name, restore) for name in ("fit", "train_on_batch")]
    return [*training, *(UseGuard(model, name, restore, within) for name in _USES)]


def guard_writes(model: Any, restore: Callable[[], None]) -> list[MethodGuard]:
    """Install guards that restore the weights before the model is trained or gets other weights.

    Other callbacks may write weights while ``fit`` ends, which keeps them.
    """
    within = partial(is_running, model, "fit")
    training = [UseGuard(model, name, restore) for name in ("fit", "train_on_batch")]
    return [
        *training,
        *(UseGuard(model, name, restore, within) for name in ("load_weights", "set_weights")),
    ]


def refuse_writes(model: Any, refuse: Callable[[str], None]) -> list[MethodGuard]:
    """Install guards on methods that train or overwrite the average; ``refuse(method)`` raises."""
    names = ("fit", "train_on_batch", "load_weights", "set_weights")
    return [UseGuard(model, name, partial(refuse, name)) for name in names]
