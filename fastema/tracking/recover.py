"""The values of single batches, from the mean since the epoch began that Keras reports.

With ``m_k`` the mean over the first ``k`` batches and ``S_k`` the samples in them (or whatever else
the mean was weighted by), batch ``k`` had the value

``x_k = (S_k m_k - S_(k-1) m_(k-1)) / (S_k - S_(k-1))``.

The widely copied ``(k + 1) m_k - k m_(k-1)`` is that for batches of one size, and wrong where the
last one is shorter. :class:`fastema.keras.LossAverages` needs neither: it reads what each batch
added.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastema.errors import ArgumentError

__all__ = ["from_means", "from_totals"]

Curve = NDArray[np.float64]


def from_means(means: ArrayLike, counts: ArrayLike) -> Curve:
    """Batch values of a running mean: ``x_k = (S_k m_k - S_(k-1) m_(k-1)) / (S_k - S_(k-1))``.

    Parameters
    ----------
    means : array_like of float
        ``m_k``, the mean so far after each batch.
    counts : array_like of float
        ``S_k``, the samples so far (or the sum of weights) after each batch. Where it gets smaller
        a new epoch begins, and with it a new mean. Two epochs of one batch each, where it does not,
        are given one at a time.

    Returns
    -------
    numpy.ndarray
        float64, as long as the curves. NaN where a batch counted nothing.

    Raises
    ------
    ArgumentError
        If the two are not one-dimensional and of one length, or a count is negative or NaN.

    Notes
    -----
    The means are rounded, and the difference of two large products makes more of it: of float32
    means, as Keras logs them, ``x_k`` is off by up to ``6e-8 |m| (S_k + S_(k-1)) / (S_k -
    S_(k-1))``, for batches of one size about ``1.2e-7 k |m|``. After 10,000 batches that is a
    thousandth of the mean. Sums in float32, as Keras keeps them, add as much again.

    Examples
    --------
    >>> from_means([2.0, 3.0, 3.5], [32, 64, 72])      # a last batch of 8
    array([2. , 4. , 7.5])
    """
    m, s = _curves(means, counts, "means")
    # Nothing counted, no mean: Keras shows 0, others NaN.
    return _differences(np.where(s == 0.0, 0.0, m) * s, s)


def from_totals(totals: ArrayLike, counts: ArrayLike) -> Curve:
    """Batch values of running sums: ``x_k = (T_k - T_(k-1)) / (S_k - S_(k-1))``.

    Parameters
    ----------
    totals : array_like of float
        ``T_k``, the weighted sum so far after each batch: ``total`` of a Keras metric.
    counts : array_like of float
        As for :func:`from_means`: ``count`` of a Keras metric.

    Returns
    -------
    numpy.ndarray
        float64, as long as the curves. NaN where a batch counted nothing.

    Raises
    ------
    ArgumentError
        As for :func:`from_means`.

    Notes
    -----
    Off by half a unit in the last place of ``T_k``, divided by the batch's count: for float32 sums
    and batches of one size up to ``6e-8 k |m|``.

    Examples
    --------
    >>> from_totals([64.0, 192.0, 252.0, 96.0], [32, 64, 72, 32])    # the last: of another epoch
    array([2. , 4. , 7.5, 3. ])
    """
    return _differences(*_curves(totals, counts, "totals"))


def _curves(values: ArrayLike, counts: ArrayLike, name: str) -> tuple[Curve, Curve]:
    try:
        v, s = np.asarray(values, np.float64), np.asarray(counts, np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} and counts: expected numbers: {error}") from None
    if v.ndim != 1 or v.shape != s.shape:
        raise ArgumentError(
            f"{name} of shape {v.shape}, counts of shape {s.shape}: expected one of each per batch"
        )
    bad = np.flatnonzero(~(s >= 0.0) | np.isinf(s))
    if bad.size:
        raise ArgumentError(
            f"counts[{bad[0]}] is {s[bad[0]]}: expected the finite number of samples so far"
        )
    return v, s


def _differences(totals: Curve, counts: Curve) -> Curve:
    before = np.concatenate([[0.0], counts[:-1]])
    begins = counts < before
    before[begins] = 0.0
    totals_before = np.concatenate([[0.0], totals[:-1]])
    totals_before[begins] = 0.0
    added = counts - before
    values = np.full(len(counts), np.nan)
    np.divide(totals - totals_before, added, out=values, where=added > 0.0)
    return values
