"""The source of an update's decay, and checks of numbers and variables that users pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from fastema.errors import ArgumentError

__all__ = ["DecaySource", "check_number", "checked_number", "variable_of"]


def variable_of(obj: Any) -> Any:
    """Return a tf.Variable itself, the tf.Variable of a Keras variable, or None."""
    if isinstance(obj, tf.Variable):
        return obj
    value = getattr(obj, "value", None)
    return value if isinstance(value, tf.Variable) else None


def checked_number(source: Any, what: str) -> Any:
    """Return a number as a float, or a tensor or variable unchanged.

    Raise an ArgumentError for a number out of range, or a tensor that is not a real scalar.
    """
    variable = variable_of(source)
    if variable is not None:
        source = variable
    if not isinstance(source, tf.Variable | tf.Tensor):
        try:
            number = float(source)
        except (TypeError, ValueError):
            number = math.nan
        check_number(number, what, source)
        return number
    real = source.dtype.is_floating or source.dtype.is_integer
    if source.shape.rank not in (0, None) or not real:
        raise ArgumentError(
            f"{what} of shape {source.shape} and dtype {source.dtype.name}: expected a real scalar"
        )
    return source


def check_number(number: float, what: str, given: Any = None) -> None:
    """Raise an ArgumentError if a decay or a number of updates is out of range."""
    highest, words = (1.0, "in [0, 1]") if what == "decay" else (math.inf, "of at least 0")
    if not 0.0 <= number <= highest or math.isinf(number):
        shown = number if given is None else given
        raise ArgumentError(f"{what}={shown!r}: expected a finite number {words}")


@dataclass(frozen=True, eq=False)
class DecaySource:
    """The source of the decay: numbers, or tensors and variables read at each update."""

    decay: Any
    num_updates: Any

    def _get_changing_sources(self) -> dict[str, Any]:
        sources = {"decay": self.decay, "num_updates": self.num_updates}
        return {name: one for name, one in sources.items() if not isinstance(one, float | None)}

    def get_tensors(self) -> list[Any]:
        """Return the tensors and variables to read at run time, as float64 scalars."""
        return [
            tf.cast(tf.convert_to_tensor(one), tf.float64)
            for one in self._get_changing_sources().values()
        ]

    def read_decay(self) -> float:
        """Return the decay, reading tensors and variables now."""
        return self.compute_decay(
            [float(one.numpy()) for one in self._get_changing_sources().values()]
        )

    def compute_decay(self, values: list[float]) -> float:
        """Return the decay, given the values of :meth:`get_tensors`."""
        found = dict(zip(self._get_changing_sources(), values, strict=True))
        for name, value in found.items():
            check_number(value, name)
        decay: float = found.get("decay", self.decay)
        count = found.get("num_updates", self.num_updates)
        return decay if count is None else min(decay, (1.0 + count) / (10.0 + count))
