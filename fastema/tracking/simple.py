"""The mean of the last numbers, one by one and as a series."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from fastema.engine import series
from fastema.errors import ArgumentError
from fastema.rules.checks import checked_whole
from fastema.tracking.scalar import Floats, MovingAverage, OnNonFinite, Run
from fastema.tracking.window import WindowSum

__all__ = ["SimpleMovingAverage"]

LARGEST_WINDOW: Final = 10**9


class SimpleMovingAverage(MovingAverage):
    """The mean of the last ``window_size`` values, of all of them until there are so many.

    ``avg_n = (x_(n-window_size+1) + ... + x_n) / window_size``; with weights
    ``sum(w_k x_k) / sum(w_k)`` over the same values. A value costs the same for any window, and no
    error builds up, after ten million values as after ten: without weights each average is the sum
    of its window, exact but for one rounding, divided by their number. With weights the products
    are rounded too. To be used by one thread at a time.

    Memory: 24 bytes per value of the window, 48 with weights, and twice that for a moment each time
    that the window has been filled anew, which takes 10 to 20 ns per value; so does
    :meth:`update_many` at its end.

    Parameters
    ----------
    window_size : int
        Values, from 1 to 1e9.
    on_nonfinite : {"show", "skip", "propagate", "raise"}
        What a NaN or an infinity does, see :class:`MovingAverage`.

    Raises
    ------
    ArgumentError
        If an argument has no valid value.

    Examples
    --------
    >>> loss = SimpleMovingAverage(window_size=3)
    >>> [loss.update(x) for x in (3.0, 1.0, 2.0, 6.0)]
    [3.0, 2.0, 2.0, 3.0]
    """

    __slots__ = ("_products", "_weights", "_window_size")

    def __init__(self, window_size: int = 20, *, on_nonfinite: OnNonFinite = "show") -> None:
        self._window_size = checked_whole(window_size, "window_size", 1)
        if window_size > LARGEST_WINDOW:
            raise ArgumentError(
                f"window_size={window_size}: expected at most {LARGEST_WINDOW:,}; for the mean of "
                "all values so far, keep their sum"
            )
        super().__init__(on_nonfinite)

    def _begin(self) -> None:
        super()._begin()
        self._products = WindowSum(self._window_size)
        self._weights: WindowSum | None = None  # until one is not 1

    @property
    def window_size(self) -> int:
        """Most values in the window."""
        return self._window_size

    @property
    def count(self) -> int:
        """Values in the window."""
        self._read_pending()
        return self._products.count

    def _settings(self) -> dict[str, Any]:
        return {"window_size": self._window_size, "on_nonfinite": self._on_nonfinite}

    def _push(self, x: float, weight: float) -> float:
        if weight == 1.0 and self._weights is None:
            window = self._products
            return window.push(x) / window.count
        weights = self._window_of_weights()
        return self._products.push(weight * x) / weights.push(weight)

    def _window_of_weights(self) -> WindowSum:
        if self._weights is None:
            self._weights = WindowSum(self._window_size, np.ones(self._products.count))
        return self._weights

    def _run(self, x: Floats, weights: Floats | None) -> Run:
        if self._weights is None and (weights is None or (weights == 1.0).all()):
            return self._roll(self._products, x, divide=True)
        given = np.ones(len(x)) if weights is None else weights
        total, finite, refill = self._roll(self._products, given * x)
        total_weight, _, refill_weights = self._roll(self._window_of_weights(), given)

        def take_in() -> None:
            refill()
            refill_weights()

        return total / total_weight, finite, take_in

    def _roll(self, window: WindowSum, x: Floats, *, divide: bool = False) -> Run:
        before = window.numbers()
        result, finite = series.rolling_mean(x, before, self._window_size, divide=divide)
        kept = np.concatenate([before, x[-self._window_size :]])
        return result, finite, lambda: window.refill(kept)

    def _memory(self) -> dict[str, Any]:
        weights = self._weights
        return {
            "products": self._products.numbers().tolist(),
            "weights": None if weights is None else weights.numbers().tolist(),
        }

    def _remember(self, memory: Mapping[str, Any]) -> None:
        count = min(self._num_updates, self._window_size)
        products = np.array(memory["products"], np.float64)
        if products.shape != (count,):
            raise ValueError(f"a window of shape {products.shape} where {count} were expected")
        self._products.refill(products)
        if memory["weights"] is not None:
            weights = np.array(memory["weights"], np.float64)
            if weights.shape != (count,) or not (weights > 0.0).all():
                raise ValueError("weights that are not one positive number for each value")
            self._weights = WindowSum(self._window_size, weights)
