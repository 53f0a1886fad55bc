"""A number that is not there yet: it is read from its device when somebody looks."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

from fastema.bridges.registry import scalar

__all__ = ["Deferred", "number"]


class Deferred:
    """A float that is read when it is used: printed, formatted, compared, calculated with.

    It has the methods of ``float``; ``float(number)`` gives one for good, and so do copies and
    pickles.

    Parameters
    ----------
    read : callable
        Called without arguments at the first use; what it returns is kept.
    """

    __slots__ = ("_read", "_value")

    def __init__(self, read: Callable[[], float]) -> None:
        self._read: Callable[[], float] | None = read
        self._value = 0.0

    def settle(self, value: float) -> None:
        """Give the value before anybody asks."""
        self._value, self._read = value, None

    def __float__(self) -> float:
        if self._read is not None:
            value = self._read()
            if self._read is not None:  # unless reading settled it
                self.settle(value)
        return self._value

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


def _as_float(name: str) -> Callable[..., Any]:
    of_float = getattr(float, name)

    def method(self: Deferred, *args: Any) -> Any:
        return of_float(float(self), *(float(x) if isinstance(x, Deferred) else x for x in args))

    method.__name__ = name
    method.__doc__ = of_float.__doc__
    return method


for _name in (
    *("__abs__", "__add__", "__bool__", "__ceil__", "__divmod__", "__eq__", "__floor__"),
    *("__floordiv__", "__format__", "__ge__", "__gt__", "__hash__", "__int__", "__le__", "__lt__"),
    *("__mod__", "__mul__", "__ne__", "__neg__", "__pos__", "__pow__", "__radd__", "__rdivmod__"),
    *("__repr__", "__rfloordiv__", "__rmod__", "__rmul__", "__round__", "__rpow__", "__rsub__"),
    *("__rtruediv__", "__str__", "__sub__", "__truediv__", "__trunc__"),
    *("as_integer_ratio", "conjugate", "hex", "is_integer"),
):
    setattr(Deferred, _name, _as_float(_name))

Real.register(Deferred)


def number(value: Any) -> float | Deferred:
    """A value of any framework as a float, or as one that is read when it is used.

    Raises
    ------
    BridgeError
        For what is no number, or several.
    """
    if isinstance(value, float | Deferred):
        return value
    found = scalar(value)
    return Deferred(found) if callable(found) else found
