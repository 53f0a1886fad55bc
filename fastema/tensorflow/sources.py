"""The source of an update's decay, and the variables in what users pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from fastema.errors import ArgumentError

__all__ = ["DecaySource", "check_number", "checked_number", "variable_of"]


def variable_of(obj: Any) -> Any:
    """The tf.Variable that something is or, as a Keras variable, holds; else None."""
    if isinstance(obj, tf.Variable):
        return obj
    value = getattr(obj, "value", None)
    return value if isinstance(value, tf.Variable) else None


def checked_number(source: Any, what: str) -> Any:
    """A number as a float, a tensor or variable as it is, checked as far as it is known."""
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
    """Refuse a decay or a number of updates that is none."""
    highest, words = (1.0, "in [0, 1]") if what == "decay" else (math.inf, "of at least 0")
    if not 0.0 <= number <= highest or math.isinf(number):
        shown = number if given is None else given
        raise ArgumentError(f"{what}={shown!r}: expected a finite number {words}")


@dataclass(frozen=True, eq=False)
class DecaySource:
    """The source of the decay: numbers, or tensors and variables read at each update."""

    decay: Any
    num_updates: Any

    def _changing(self) -> dict[str, Any]:
        sources = {"decay": self.decay, "num_updates": self.num_updates}
        return {name: one for name, one in sources.items() if not isinstance(one, float | None)}

    def symbolic(self) -> list[Any]:
        """Return what has to be evaluated at run time, as scalars in float64."""
        return [tf.cast(tf.convert_to_tensor(one), tf.float64) for one in self._changing().values()]

    def now(self) -> float:
        """The decay, with everything read now."""
        return self.of([float(one.numpy()) for one in self._changing().values()])

    def of(self, values: list[float]) -> float:
        """The decay, given the values of :meth:`symbolic`."""
        found = dict(zip(self._changing(), values, strict=True))
        for name, value in found.items():
            check_number(value, name)
        decay: float = found.get("decay", self.decay)
        count = found.get("num_updates", self.num_updates)
        return decay if count is None else min(decay, (1.0 + count) / (10.0 + count))
