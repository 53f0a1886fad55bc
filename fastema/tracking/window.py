"""The sum of the last numbers, at a cost that does not grow with how many, and without drift.

Numbers are never subtracted. They come in blocks as long as the window: the window is the end of
one block and the beginning of the next, and so its sum is one from behind, worked out once when
that block was full, plus one from the front. What has left the window is gone without a trace, an
infinity too. Every sum is kept in two floats, the second of which holds what the first one rounded
off (D. E. Knuth, The Art of Computer Programming, volume 2, section 4.2.2).
"""

from __future__ import annotations

from array import array
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["WindowSum"]

Floats: TypeAlias = "array[float]"

_VECTORISED: Final = 128
"""Numbers from which on NumPy is quicker than a loop."""


class WindowSum:
    """The sum of the last ``size`` numbers pushed, of all of them until then.

    ``numbers`` are those pushed before, the last one last. The state is one attribute, which a push
    assigns at its end: one that is interrupted did not happen.
    """

    __slots__ = ("_ring", "_state", "size")

    def __init__(self, size: int, numbers: NDArray[np.float64] | None = None) -> None:
        self.size = size
        self.refill(np.empty(0) if numbers is None else numbers)

    def refill(self, numbers: NDArray[np.float64]) -> None:
        """Begin again with these numbers; the last ``size`` count."""
        kept = numbers[-self.size :]
        self._ring = _floats(np.concatenate([np.zeros(self.size - len(kept)), kept]))
        none = array("d")
        self._state = (self.size, 0.0, 0.0, none, none, len(kept))

    def push(self, x: float) -> float:
        """Take in a number; the sum."""
        at, high, low, back, back_low, count = self._state
        if at == self.size:
            at, high, low, (back, back_low) = 0, 0.0, 0.0, _sums_from_behind(self._ring)
        self._ring[at] = x
        at += 1
        front = high + x
        took = front - high
        low += (high - (front - took)) + (x - took)
        behind = back[at]
        total = front + behind
        if total - total == 0.0:  # finite; otherwise what was rounded off is no number
            took = total - front
            total += ((front - (total - took)) + (behind - took)) + low + back_low[at]
        if count < self.size:
            count += 1
        self._state = (at, front, low, back, back_low, count)
        return total

    @property
    def count(self) -> int:
        """Count of the numbers in the sum."""
        return self._state[5]

    def numbers(self) -> NDArray[np.float64]:
        """All of them, the latest last."""
        at, ring = self._state[0], np.frombuffer(self._ring)
        return np.concatenate([ring[at:], ring[:at]])[self.size - self.count :]


def _floats(numbers: NDArray[np.float64]) -> Floats:
    return array("d", numbers.tobytes())


def _sums_from_behind(numbers: Floats) -> tuple[Floats, Floats]:
    """Sum ``numbers[i:]`` for every i: the sums, and what they round off."""
    if len(numbers) >= _VECTORISED:
        return _scan(np.frombuffer(numbers))
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


def _scan(numbers: NDArray[Any]) -> tuple[Floats, Floats]:
    """The same with NumPy, whose running sum adds up one by one."""
    added = np.concatenate([[0.0], numbers[::-1]])
    with np.errstate(invalid="ignore", over="ignore"):
        after = np.cumsum(added)
        before = np.concatenate([[0.0], after[:-1]])
        took = after - before
        rests = np.cumsum((before - (after - took)) + (added - took))
    return _floats(after[::-1]), _floats(rests[::-1])
