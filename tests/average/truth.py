"""A float64 loop of an average, and a bound on the error of an average in other dtypes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDOFF = {"f64": 2.0**-53, "f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
"""Half a unit in the last place of 1: the largest relative error of one rounding."""

SMALLEST = {"f64": 0.0, "f32": 2.0**-150, "f16": 2.0**-25, "bf16": 2.0**-134}
"""Half the smallest subnormal: the largest absolute error of one rounding near zero."""


class Loop:
    """The exact average of one tensor, with a bound on the error of a computed one.

    With ``e`` the error so far, ``u`` the roundoff of the arithmetic and ``v`` that of the
    average's dtype, one update ``avg + w * (x - avg)`` leaves at most
    ``(1 - w) |e| + 3 u w |x - avg| + u |avg| + v |avg|``: three roundings in the product (of ``w``
    and of the difference; an fma adds none, so this is generous), one in the sum, one in storing.
    """

    def __init__(
        self, weights: NDArray[Any], stored: str, arithmetic: str, random: bool = False
    ) -> None:
        self._u = ROUNDOFF[arithmetic]
        self._v, self._least = ROUNDOFF[stored], SMALLEST[stored]
        if random:
            self._v, self._least = 2 * self._v, 2 * self._least
        self.value = np.asarray(weights, np.float64).copy()
        self.error = self._v * np.abs(self.value) + self._least

    def step(self, weights: NDArray[Any], weight: float) -> None:
        """Update the exact average with new weights."""
        change = weight * (np.asarray(weights, np.float64) - self.value)
        self.value = self.value + change
        self.error = (
            (1 - weight) * self.error
            + 3 * self._u * (np.abs(change) + weight * self.error)
            + (self._u + self._v) * (np.abs(self.value) + self.error)
            + self._least
        )

    def check(self, average: NDArray[Any], name: str = "") -> None:
        """Assert that an average is within the bound everywhere."""
        # Twice the bound, because the loop itself rounds to float64 at each step.
        off = np.abs(np.asarray(average, np.float64) - self.value)
        worst = np.max(off - 2 * self.error, initial=-1.0)
        assert np.isfinite(off).all(), f"{name}: not finite"
        assert worst <= 0, f"{name}: {worst} beyond the bound"


class Loops:
    """One :class:`Loop` for each of several named arrays of one dtype."""

    def __init__(self, weights: Mapping[str, NDArray[Any]], *options: Any) -> None:
        self.loops = {name: Loop(one, *options) for name, one in weights.items()}

    def step(self, weights: Mapping[str, NDArray[Any]], weight: float) -> None:
        """Update the exact average with new weights."""
        for name, loop in self.loops.items():
            loop.step(weights[name], weight)

    def check(self, average: Mapping[str, Any]) -> None:
        """Assert that every average is within its bound."""
        for name, loop in self.loops.items():
            loop.check(average[name], name)


def arithmetic_of(weights: str, stored: str) -> str:
    """Return the code of the arithmetic: float64 if either side is, otherwise float32."""
    return "f64" if "f64" in (weights, stored) else "f32"
