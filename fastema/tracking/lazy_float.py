"""A float that is read from its device on first use."""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastema.bridges.registry import scalar

__all__ = ["LazyFloat", "number"]


class LazyFloat:
    """Float whose value is read on first use and cached, with the methods of ``float``.

    Arithmetic with arrays and tensors works as with a float. ``pickle`` stores a float; ``json``
    and ``torch.load(weights_only=True)`` do not support the type. An Exception raised by ``read()``
    is cached and raised again.
    """

    __slots__ = ("_read", "_result")

    def __init__(self, read: Callable[[], float]) -> None:
        self._read: Callable[[], float] | None = read
        self._result: float | Exception = 0.0

    def resolve(self, result: float | Exception) -> None:
        """Set the value, or the error to raise, so that ``read`` is not called."""
        self._result, self._read = result, None

    def __float__(self) -> float:
        if self._read is not None:
            try:
                result: float | Exception = self._read()
            except Exception as error:
                result = error
            if self._read is not None:  # read() may have resolved it
                self.resolve(result)
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def item(self) -> float:
        """Return the value, like the method of a one-element array."""
        return float(self)

    @property
    def real(self) -> float:
        """The value itself."""
        return float(self)

    @property
    def imag(self) -> float:
        """Imaginary part, always 0."""
        return 0.0

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(float(self), dtype)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a PyTorch function with every LazyFloat argument converted to float."""
        return function(*map(_plain, args), **{k: _plain(v) for k, v in (kwargs or {}).items()})

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, LazyFloat) else value


def _float_method(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(float, name)(float(self), *map(_plain, args))


def _operator(name: str, reflected: bool) -> Callable[..., Any]:
    """Return a method that applies a Python operator, so that ``other`` can take part.

    ``other`` may be an array or a Fraction, with its own implementation of the operator.
    """
    apply = divmod if name == "divmod" else getattr(operator, name)

    def method(self: LazyFloat, other: Any, *modulo: None) -> Any:
        sides = float(self), _plain(other)
        return apply(*(sides[::-1] if reflected else sides))

    return method


for _name in (
    *("__abs__", "__bool__", "__ceil__", "__floor__", "__format__", "__hash__", "__int__"),
    *("__neg__", "__pos__", "__repr__", "__round__", "__str__", "__trunc__"),
    *("as_integer_ratio", "conjugate", "hex", "is_integer"),
):
    setattr(LazyFloat, _name, _float_method(_name))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(LazyFloat, f"__{_name}__", _operator(_name, False))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow"):
    setattr(LazyFloat, f"__{_name}__", _operator(_name, False))
    setattr(LazyFloat, f"__r{_name}__", _operator(_name, True))

Real.register(LazyFloat)


def number(value: Any) -> float | LazyFloat:
    """Return a scalar of any framework as a float, or as a LazyFloat if it is still on a device.

    Raise a BridgeError if ``value`` is not a single number.
    """
    if isinstance(value, float | LazyFloat):
        return value
    found = scalar(value)
    return LazyFloat(found) if callable(found) else found
