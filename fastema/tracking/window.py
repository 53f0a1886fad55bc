"""The sum of the last numbers, without drift and at a cost that does not depend on their count.

Numbers are never subtracted. The series is split into blocks as long as the window, so a window is
a suffix of one block and a prefix of the next. Its sum is a suffix sum, computed once when the
block was full, plus a running prefix sum. A number that has left the window leaves no trace, not
even an infinity. Every sum is stored in two floats: the rounded sum and its residual (D. E. Knuth,
The Art of Computer Programming, volume 2, section 4.2.2).
"""

from __future__ import annotations

from array import array
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["WindowSum"]

Floats: TypeAlias = "array[float]"

_VECTORISED: Final = 128
"""Length from which NumPy is faster than a loop."""


class WindowSum:
    """Sum of the last ``size`` numbers pushed, or of all numbers while there are fewer.

    ``numbers`` are the numbers pushed earlier, the latest last. The state is one attribute, which a
    push assigns at its end, so an interrupted push has no effect.
    """

    __slots__ = ("_ring", "_state", "size")

    def __init__(self, size: int, numbers: NDArray[np.float64] | None = None) -> None:
        self.size = size
        self.refill(np.empty(0) if numbers is None else numbers)

    def refill(self, numbers: NDArray[np.float64]) -> None:
        """Replace the contents with the last ``size`` of these numbers."""
        kept = numbers[-self.size :]
        self._ring = _floats(np.concatenate([np.zeros(self.size - len(kept)), kept]))
        none = array("d")
        self._state = (self.size, 0.0, 0.0, none, none, len(kept))

    def push(self, x: float) -> float:
        """Add a number and return the sum."""
        at, high, low, back, back_low, count = self._state
        if at == self.size:
            at, high, low, (back, back_low) = 0, 0.0, 0.0, _compute_suffix_sums(self._ring)
        self._ring[at] = x
        at += 1
        front = high + x
        took = front - high
        low += (high - (front - took)) + (x - took)
        behind = back[at]
        total = front + behind
        if total - total == 0.0:  # finite; otherwise the residual would be NaN
            took = total - front
            total += ((front - (total - took)) + (behind - took)) + low + back_low[at]
        if count < self.size:
            count += 1
        self._state = (at, front, low, back, back_low, count)
        return total

    @property
    def count(self) -> int:
        """Number of values in the sum."""
        return self._state[5]

    def numbers(self) -> NDArray[np.float64]:
        """Return the numbers in the sum, the latest last."""
        at, ring = self._state[0], np.frombuffer(self._ring)
        return np.concatenate([ring[at:], ring[:at]])[self.size - self.count :]


def _floats(numbers: NDArray[np.float64]) -> Floats:
    return array("d", numbers.tobytes())


def _compute_suffix_sums(numbers: Floats) -> tuple[Floats, Floats]:
    """Return the sum of ``numbers[i:]`` for every i, and the residuals."""
    if len(numbers) >= _VECTORISED:
        return _compute_suffix_sums_numpy(np.frombuffer(numbers))
    sums, rests = [0.0], [0.0]
    total, rest = 0.0, 0.0
    for x in reversed(numbers):
        after = total + x
        took = after - total
        rest += (total - (after - took)) + (x - took)
        total = after
        sums.append(total)
        rests.append(rest)
    return array("d", sums[::-1]), array("d", rests[::-1])


def _compute_suffix_sums_numpy(numbers: NDArray[Any]) -> tuple[Floats, Floats]:
    """Return the sums of ``numbers[i:]`` and residuals, computed by NumPy's sequential cumsum."""
    added = np.concatenate([[0.0], numbers[::-1]])
    with np.errstate(invalid="ignore", over="ignore"):
        after = np.cumsum(added)
        before = np.concatenate([[0.0], after[:-1]])
        took = after - before
        rests = np.cumsum((before - (after - took)) + (added - took))
    return _floats(after[::-1]), _floats(rests[::-1])
