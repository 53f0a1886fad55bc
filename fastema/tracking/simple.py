"""The mean of the last numbers, one at a time or as a series."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from fastema.engine import series
from fastema.errors import ArgumentError
from fastema.hints import check_options
from fastema.rules.checks import validate_int
from fastema.tracking.scalar import SCALE, Floats, MovingAverage, OnNonFinite, Run
from fastema.tracking.window import WindowSum

__all__ = ["SimpleMovingAverage"]

LARGEST_WINDOW: Final = 10**9

_SMALL: Final = 2.0**-64
"""Factor for values whose sum would overflow."""


class SimpleMovingAverage(MovingAverage):
    """Mean of the last ``window_size`` values, or of all values while there are fewer.

    ``avg_n = (x_(n-window_size+1) + ... + x_n) / window_size``; with weights
    ``sum(w_k x_k) / sum(w_k)`` over the same values. The cost per value does not depend on the
    window, and errors do not accumulate. Without weights, each average is the sum of its window,
    exact to 2**-104 of the sum of the magnitudes and then rounded once, divided by the number of
    values. With weights, the products are rounded too; those below 1e-190 in magnitude lose digits,
    and those below 1e-210 count as 0. Use an instance from one thread at a time.

    Memory: 24 bytes per value of the window, 48 with weights. Each time the window has been filled
    once more, twice that is needed temporarily, and the refill takes 10 to 20 ns per value. The
    same happens at the end of :meth:`update_many`.

    Parameters
    ----------
    window_size : int
        Largest number of values in the mean, from 1 to 1e9; 20 by default.
    on_nonfinite : {"show", "skip", "propagate", "raise"}
        How to treat a NaN or an infinity, see :class:`MovingAverage`; ``"show"`` by default.

    Raises
    ------
    ArgumentError
        If an argument is invalid.

    Examples
    --------
    >>> loss = SimpleMovingAverage(window_size=3)
    >>> [loss.update(x) for x in (3.0, 1.0, 2.0, 6.0)]
    [3.0, 2.0, 2.0, 3.0]
    """

    __slots__ = ("_products", "_weights", "_window_size")

    @check_options
    def __init__(self, window_size: int = 20, *, on_nonfinite: OnNonFinite = "show") -> None:
        self._window_size = validate_int(window_size, "window_size", 1)
        if window_size > LARGEST_WINDOW:
            raise ArgumentError(
                f"window_size={window_size}: expected at most {LARGEST_WINDOW:,}; for the mean of "
                "all values so far, keep their sum"
            )
        super().__init__(on_nonfinite)

    def _reset_values(self) -> None:
        super()._reset_values()
        self._products = WindowSum(self._window_size)
        self._weights: WindowSum | None = None  # None until a weight is not 1

    @property
    def window_size(self) -> int:
        """Largest number of values in the window."""
        return self._window_size

    @property
    def count(self) -> int:
        """Number of values in the window."""
        self._read_pending()
        return self._products.count

    def _settings(self) -> dict[str, Any]:
        return {"window_size": self._window_size, "on_nonfinite": self._on_nonfinite}

    def _push(self, x: float, weight: float) -> float:
        if weight == 1.0 and self._weights is None:
            window = self._products
            average = window.push(x) / window.count
            return average if average - average == 0.0 else _mean(window.numbers(), average)
        weights, weight = self._window_of_weights(), weight * SCALE
        return self._products.push(weight * x) / weights.push(weight)

    def _window_of_weights(self) -> WindowSum:
        if self._weights is None:
            products, weights = self._get_scaled_window()
            self._products.refill(products)
            self._weights = WindowSum(self._window_size, weights)
        return self._weights

    def _average_series(self, x: Floats, weights: Floats | None) -> Run:
        if self._weights is None and (weights is None or (weights == 1.0).all()):
            return self._run_plain(x)
        given = np.full(len(x), SCALE) if weights is None else weights * SCALE
        products, of_weights = self._get_scaled_window()
        total, finite, kept = self._roll(products, given * x)
        total_weight, _, kept_weights = self._roll(of_weights, given)

        def take_in() -> None:
            self._products.refill(kept)
            self._weights = WindowSum(self._window_size, kept_weights)

        return total / total_weight, finite, take_in

    def _run_plain(self, x: Floats) -> Run:
        before = self._products.numbers()
        averages, finite, kept = self._roll(before, x, divide=True)
        if not finite and np.isfinite(x).all() and np.isfinite(before).all():
            # The sum of the largest floats overflows.
            scaled, finite, _ = self._roll(before * _SMALL, x * _SMALL, divide=True)
            averages = np.where(np.isfinite(averages), averages, scaled / _SMALL)
        return averages, finite, lambda: self._products.refill(kept)

    def _get_scaled_window(self) -> tuple[Floats, Floats]:
        """Return the products and weights in the window, scaled, also if all weights are 1."""
        products = self._products.numbers()
        if self._weights is None:
            return products * SCALE, np.full(len(products), SCALE)
        return products, self._weights.numbers()

    def _roll(
        self, before: Floats, x: Floats, *, divide: bool = False
    ) -> tuple[Floats, bool, Floats]:
        """Return rolling sums or means over ``x``, whether they are finite, and the new window."""
        result, finite = series.rolling_mean(x, before, self._window_size, divide=divide)
        return result, finite, np.concatenate([before, x[-self._window_size :]])

    def _get_state(self) -> dict[str, Any]:
        weights = self._weights
        return {
            "products": self._products.numbers().tolist(),
            "weights": None if weights is None else weights.numbers().tolist(),
        }

    def _set_state(self, memory: Mapping[str, Any]) -> None:
        count = min(self._num_updates, self._window_size)
        products = np.array(memory["products"], np.float64)
        if products.shape != (count,):
            raise ValueError(f"a window of shape {products.shape}, expected ({count},)")
        self._products.refill(products)
        if memory["weights"] is not None:
            weights = np.array(memory["weights"], np.float64)
            if weights.shape != (count,) or not (weights > 0.0).all():
                raise ValueError("weights must be one positive number per value")
            self._weights = WindowSum(self._window_size, weights)


def _mean(numbers: Floats, otherwise: float) -> float:
    """Return the mean of finite numbers whose sum overflows; ``otherwise`` if any is not finite."""
    if not np.isfinite(numbers).all():
        return otherwise
    return math.fsum(numbers * _SMALL) / len(numbers) / _SMALL
