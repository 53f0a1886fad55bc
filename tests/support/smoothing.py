"""Reference curves for scalar averages: their definitions in float64, evaluated naively."""

import math
from collections.abc import Sequence

import numpy as np

RTOL = 1e-12  # double-precision averages against sums that are rounded once


def sma(values: Sequence[float], window: int, weights: Sequence[float] | None = None) -> np.ndarray:
    """Return the mean of the last ``window`` values, or of all while there are fewer."""
    weights = [1.0] * len(values) if weights is None else weights
    means = []
    for end in range(1, len(values) + 1):
        start = max(end - window, 0)
        products = [w * x for w, x in zip(weights[start:end], values[start:end], strict=True)]
        means.append(math.fsum(products) / math.fsum(weights[start:end]))
    return np.array(means)


def ema(
    values: Sequence[float],
    decay: float,
    weights: Sequence[float] | None = None,
    debias: bool = False,
) -> np.ndarray:
    """Return exponential means; without ``debias``, the first value stands for all the past."""
    weights = [1.0] * len(values) if weights is None else weights
    averages = []
    for end in range(1, len(values) + 1):
        shares = [(1.0 - decay) * decay ** (end - 1 - k) for k in range(end)]
        if not debias:
            shares[0] = decay ** (end - 1)
        shares = [share * weight for share, weight in zip(shares, weights, strict=False)]
        products = [share * x for share, x in zip(shares, values, strict=False)]
        averages.append(math.fsum(products) / math.fsum(shares))
    return np.array(averages)


def assert_close(got: Sequence[float], want: Sequence[float] | np.ndarray) -> None:
    assert len(got) == len(want)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=RTOL, atol=0.0)
