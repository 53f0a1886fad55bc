"""Guards that restore a model's weights when Keras no longer calls its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

__all__ = [
    "ErrorGuard",
    "MethodGuard",
    "UseGuard",
    "guard_training",
    "guard_use",
    "guard_writes",
    "is_end_of_data",
    "refuse_writes",
]


_TRAINING: Final = ("fit", "train_on_batch")
_WRITES: Final = ("load_weights", "set_weights")
_READS: Final = ("evaluate", "predict", "save", "save_weights", "get_weights")


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
    """Restores the weights if the method raises; ``look`` gets its keyword arguments before."""

    def __init__(
        self,
        of: Any,
        name: str,
        restore: Callable[[], None],
        look: Callable[[dict[str, Any]], None] = lambda given: None,
    ) -> None:
        super().__init__(of, name)
        self._restore, self._look = restore, look

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        self._look(kwargs)
        try:
            return self._inner(*args, **kwargs)
        except BaseException as error:
            if not is_end_of_data(error):
                self._restore()
            raise


class UseGuard(MethodGuard):
    """Calls ``restore()`` before the method, which also removes this guard, or raises."""

    def __init__(self, of: Any, name: str, restore: Callable[[], None]) -> None:
        super().__init__(of, name)
        self._restore = restore

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        self._restore()
        return getattr(self._of, self._name)(*args, **kwargs)


def guard_training(model: Any, restore: Callable[[], None]) -> list[MethodGuard]:
    """Install guards that restore the weights before the model is trained."""
    return [UseGuard(model, name, restore) for name in _TRAINING]


def guard_writes(
    model: Any, restore: Callable[[], None], overwrite: Callable[[], None] | None = None
) -> list[MethodGuard]:
    """Install guards that restore the weights before the model is trained or gets other weights.

    Before it gets other weights they call ``overwrite``, by default ``restore``.
    """
    writes = [UseGuard(model, name, overwrite or restore) for name in _WRITES]
    return [*guard_training(model, restore), *writes]


def guard_use(model: Any, restore: Callable[[], None]) -> list[MethodGuard]:
    """Install guards that restore the weights before any use of the model.

    Keras does not tell callbacks of an evaluation that raised. In one that goes on, the caller puts
    the average back for the next batch.
    """
    return [UseGuard(model, name, restore) for name in (*_TRAINING, *_WRITES, *_READS)]


def refuse_writes(model: Any, refuse: Callable[[str], None]) -> list[MethodGuard]:
    """Install guards on methods that train or overwrite the average; ``refuse(method)`` raises."""
    return [UseGuard(model, name, partial(refuse, name)) for name in (*_TRAINING, *_WRITES)]
