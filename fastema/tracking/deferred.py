"""A number that is not there yet: it is read from its device when somebody looks."""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastema.bridges.registry import scalar

__all__ = ["Deferred", "number"]


class Deferred:
    """A float that is read when it is used: printed, formatted, compared, calculated with.

    It has the methods of ``float``, and arrays and tensors calculate with it as with one.
    ``float(number)`` gives one for good, which is what belongs into a file: of those, ``pickle``
    makes a float of it, ``json`` and ``torch.load`` with ``weights_only=True`` do not know it.

    Parameters
    ----------
    read : callable
        Called without arguments at the first use. What it returns is kept, and so is an Exception
        that it raises.
    """

    __slots__ = ("_found", "_read")

    def __init__(self, read: Callable[[], float]) -> None:
        self._read: Callable[[], float] | None = read
        self._found: float | Exception = 0.0

    def settle(self, found: float | Exception) -> None:
        """Say what it is before anybody asks: a number, or the error to raise."""
        self._found, self._read = found, None

    def __float__(self) -> float:
        if self._read is not None:
            try:
                found: float | Exception = self._read()
            except Exception as error:
                found = error
            if self._read is not None:  # unless reading settled it
                self.settle(found)
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def item(self) -> float:
        """The number, as of an array of one element."""
        return float(self)

    @property
    def real(self) -> float:
        """The number."""
        return float(self)

    @property
    def imag(self) -> float:
        """0."""
        return 0.0

    def __complex__(self) -> complex:
        return complex(float(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(float(self), dtype)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What PyTorch calls in place of a function that is given one beside a tensor."""
        return function(*map(_settled, args), **{k: _settled(v) for k, v in (kwargs or {}).items()})

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


def _settled(value: Any) -> Any:
    return float(value) if isinstance(value, Deferred) else value


def _of_float(name: str) -> Callable[..., Any]:
    of_float = getattr(float, name)

    def method(self: Deferred, *args: Any) -> Any:
        return of_float(float(self), *map(_settled, args))

    method.__name__, method.__doc__ = name, of_float.__doc__
    return method


def _of_operator(name: str, reflected: bool) -> Callable[..., Any]:
    """An operator of Python's, which asks the other side too: an array, a Fraction."""
    apply = divmod if name == "divmod" else getattr(operator, name)

    def method(self: Deferred, other: Any, *modulo: None) -> Any:
        sides = float(self), _settled(other)
        return apply(*(sides[::-1] if reflected else sides))

    method.__name__ = f"__{'r' if reflected else ''}{name}__"
    return method


for _name in (
    *("__abs__", "__bool__", "__ceil__", "__floor__", "__format__", "__hash__", "__int__"),
    *("__neg__", "__pos__", "__repr__", "__round__", "__str__", "__trunc__"),
    *("as_integer_ratio", "conjugate", "hex", "is_integer"),
):
    setattr(Deferred, _name, _of_float(_name))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Deferred, f"__{_name}__", _of_operator(_name, False))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow"):
    setattr(Deferred, f"__{_name}__", _of_operator(_name, False))
    setattr(Deferred, f"__r{_name}__", _of_operator(_name, True))

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
