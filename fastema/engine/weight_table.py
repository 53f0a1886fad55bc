"""The weights of a whole run as a small table, for kernels that count the updates themselves.

A captured graph reruns the same kernels without the host, so the device must find the weight of an
update by itself. The weights of any rule are smooth or constant over most of a run; there a
polynomial reproduces them to double precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from fastema.errors import ArgumentError
from fastema.kernels.table import COEFFICIENTS, DEGREE, FIRST, SCALE, WEIGHT_COLUMNS

__all__ = ["evaluate", "weight_table"]

_SINGLE: Final = 64  # first updates with a row each: rules change fastest there
_CLOSE: Final = 2e-15  # relative error up to which a polynomial replaces the weights
_WHOLE: Final = 64  # a piece up to this length is checked at every update
_STRETCH: Final = 128  # consecutive updates that are checked last in a longer piece
_MOST: Final = 4096  # most rows, before weights jump too often; our rules take about two hundred
_ALL: Final = 8192  # first updates that are compared with the table one by one

_ROUNDING: Final = 2.0**-40
"""Largest uncertainty that rounding may leave in a weight. One minus a decay has an error of
2**-53; over ``k`` steps at once the error is ``k`` times as large."""

_GAIN: Final = 2.0
"""Factor by which halving a piece must reduce its error. For smooth weights halving divides the
error by thousands; if neither half gains this factor, the weights' own rounding is the error."""

_FITTED: Final = 0.5 - 0.5 * np.cos(np.pi * (np.arange(36) + 0.5) / 36)
"""Nodes of a polynomial fit, as fractions of a piece: denser towards its ends."""

_CHECKED: Final = (np.arange(1, 25) * 0.6180339887498949) % 1.0
"""Further points at which to check a fit: multiples of the golden ratio, even and aperiodic."""

_ADVICE: Final = (
    "Update the average outside of the captured graph, or use a rule that changes smoothly"
)

_Weight = Callable[[int], float]
_Row = NDArray[np.float64]
_Updates = NDArray[np.int64]


def weight_table(weight: Callable[[int], float], last: int = 2**31) -> NDArray[np.float64]:
    """Return the weights of updates 1, 2, ... as polynomials in a table.

    The table is float64[P, WEIGHT_COLUMNS], P < 4098. Each row is ``first, scale, c0, ..., c11``,
    with ``first`` ascending from 1. The weight of update ``u`` is in the last row whose first
    update is at most ``u``: with ``t = (u - first) * scale - 1``, in [-1, 1), it is ``c0 + c1 * t +
    ... + c11 * t**11`` by Horner's scheme, clamped to [0, 1]. The scale is a power of two, so that
    t is exact, or 0 for a piece of one weight.

    ``weight`` is a pure function: for a rule and ``update_every = k``, ``lambda u: rule.weight(u *
    k, k)``. Updates after ``last`` have the weight of ``last``. Weights outside of [0, 1], or that
    jump too often for a table, raise an ArgumentError.

    The table is exact to the bit at the first 64 updates, up to the first change of the weight,
    from the last change on, and in any piece of one weight. Elsewhere the relative error is at most
    4e-15 if the weights are rounded by less. If they are not, as one minus a decay close to 1, the
    piece passes through the middle of the rounded weights: the error is at most about twice their
    own, and below 2**-40, with or without fused multiply-adds.

    A piece is halved until it fits at every point checked, and the first 8,192 updates are all
    compared; a later exception at a few single updates may go unnoticed. Our rules take up to
    60,000 calls of ``weight``, refused rules up to two million.
    """
    if not 1 <= last < 2**53:
        raise ArgumentError(f"last={last!r}: expected a whole number from 1 to 2**53 - 1")

    @functools.cache
    def at(update: int) -> float:
        value = float(weight(update))
        if not 0.0 <= value <= 1.0:
            raise ArgumentError(
                f"the weight at update {update} is {value!r}: expected a number in [0, 1]"
            )
        return value

    rows = [_constant(1, at(1))]
    begin = 1 + _count_equal(at, 1, last)
    if begin <= last:
        end = last + 1 - _count_equal(at, last, begin)
        middle = min(max(begin, _SINGLE + 1), end)
        rows += [_constant(update, at(update)) for update in range(begin, middle)]
        for first, length in _blocks(middle, end):
            _refine(at, first, length, _fit_piece(at, first, length), rows)
        rows.append(_constant(end, at(last)))
    table = np.array(rows)
    # Drop rows that only continue the constant weight of the row before.
    one_weight = table[:, SCALE] == 0
    again = one_weight[1:] & one_weight[:-1] & (np.diff(table[:, COEFFICIENTS]) == 0)
    table = table[np.concatenate(([True], ~again))]
    updates = np.arange(1, min(last, _ALL) + 1)
    wrong = np.abs(evaluate(table, updates) - _weights_at(at, updates)) > _ROUNDING
    if wrong.any():
        raise ArgumentError(
            "the weights of this rule cannot be tabulated for a captured graph: that of update "
            f"{updates[wrong][0]} stands out from its neighbors, and there may be more like it. "
            f"{_ADVICE}"
        )
    return table


def evaluate(table: NDArray[np.float64], updates: Any) -> Any:
    """Return the weights of updates (>= 1) from a table, as a kernel computes them."""
    rows = table[np.searchsorted(table[:, FIRST], updates, side="right") - 1]
    t = (updates - rows[..., FIRST]) * rows[..., SCALE] - 1.0
    values = 0.0
    for column in range(WEIGHT_COLUMNS - 1, SCALE, -1):
        values = values * t + rows[..., column]
    return np.clip(values, 0.0, 1.0)


def _weights_at(at: _Weight, updates: _Updates) -> NDArray[np.float64]:
    return np.array([at(update) for update in updates.tolist()])


def _constant(first: int, value: float) -> _Row:
    row = np.zeros(WEIGHT_COLUMNS)
    row[FIRST], row[COEFFICIENTS] = first, value
    return row


def _blocks(first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the longest aligned pieces, as first and length, that cover updates first up to stop.

    Counted from 0, a piece begins at a multiple of its length, a power of two, but not at 0: most
    rules are powers of the update, and all octaves of a power are alike.
    """
    start = first - 1
    while start < stop - 1:
        length = start & -start
        while start + length > stop - 1:
            length //= 2
        yield start + 1, length
        start += length


def _count_equal(at: _Weight, start: int, toward: int) -> int:
    """Count the consecutive updates from start, in the direction of toward, that weigh the same."""
    value, sign = at(start), 1 if toward >= start else -1
    # The run is longer than good, and at most bad.
    good, bad, reach = 0, abs(toward - start) + 1, 1
    while reach < bad and at(start + sign * reach) == value:
        good, reach = reach, 2 * reach
    bad = min(bad, reach)
    while True:
        while bad - good > 1:
            middle = (good + bad) // 2
            if at(start + sign * middle) == value:
                good = middle
            else:
                bad = middle
        lower, upper = sorted((start, start + sign * (bad - 1)))
        others = [
            abs(update - start)
            for block in _blocks(max(lower, 2), upper + 1)
            for update in np.concatenate(_checked_updates(*block)).tolist()
            if at(update) != value
        ]
        if not others:
            return bad
        good, bad = 0, min(others)


def _fit_places(length: int) -> _Updates:
    """Return the updates at which a piece is fitted, counted from its first update."""
    return np.arange(length) if length <= _WHOLE else np.unique((_FITTED * length).astype(np.int64))


def _checked_updates(first: int, length: int) -> list[_Updates]:
    """Return the updates at which a piece is fitted, checked, and checked consecutively."""
    fitted = first + _fit_places(length)
    if length <= _WHOLE:
        return [fitted]
    points = [first, first + length - 1]
    # User-defined rules are likely to jump at round numbers: check all of the roundest ones, and
    # one multiple of each smaller power of ten.
    for digits in range(1, len(str(length))):
        ten = 10**digits
        turns = range(-(-first // ten) * ten, first + length, ten)
        for turn in turns if 10 * ten > length else turns[:1]:
            points += range(max(turn - 1, first), min(turn + 2, first + length))
    checked = np.concatenate((points, first + (_CHECKED * length).astype(np.int64)))
    count = min(length, _STRETCH)
    return [fitted, checked, first + (length - count) // 2 + np.arange(count)]


@functools.cache
def _fit_matrix(length: int) -> NDArray[np.float64]:
    """Return the least-squares matrix from the weights at a piece's points to its coefficients.

    There are more points than coefficients, so the rounding of the weights averages out. The fit
    uses Chebyshev polynomials, since powers of t are too ill-conditioned.
    """
    t = _fit_places(length) * (2.0 / length) - 1.0
    degree = min(DEGREE, len(t) - 1)
    powers = np.zeros((DEGREE + 1, degree + 1))
    for k, one in enumerate(np.eye(degree + 1)):
        powers[: k + 1, k] = chebyshev.cheb2poly(one)
    matrix: NDArray[np.float64] = powers @ np.linalg.pinv(chebyshev.chebvander(t, degree))
    return matrix


def _fit_piece(at: _Weight, first: int, length: int) -> tuple[_Row, bool, float]:
    """Fit a polynomial to a piece; return its row, whether it is close, and its largest error."""
    places = _checked_updates(first, length)
    weights = _weights_at(at, places[0])
    row = _constant(first, weights[0])
    if (weights != weights[0]).any():
        row[SCALE] = 2.0 / length
        # The second pass corrects the rounding of the first.
        for _ in range(2):
            row[COEFFICIENTS:] += _fit_matrix(length) @ (weights - evaluate(row[None], places[0]))
    close, error = True, 0.0
    for updates in places:
        weights = _weights_at(at, updates)
        errors = np.abs(evaluate(row[None], updates) - weights)
        # A polynomial goes through any few points, even on both sides of a jump.
        allowed = _CLOSE * weights if length > DEGREE + 1 else 0.0
        close = close and bool((errors <= allowed).all())
        error = max(error, float(errors.max()))
        if not close and error > _ROUNDING:
            break  # the piece will be halved: save the other calls
    return row, close, error


def _refine(
    at: _Weight, first: int, length: int, fit: tuple[_Row, bool, float], rows: list[_Row]
) -> None:
    """Append the row of a piece; if it does not fit, append those of its halves, recursively."""
    row, close, error = fit
    if not close:
        length //= 2
        halves = [(one, length, _fit_piece(at, one, length)) for one in (first, first + length)]
        gained = any(good or left * _GAIN < error for _, _, (_, good, left) in halves)
        if gained or error > _ROUNDING:
            for half in halves:
                _refine(at, *half, rows)
            return
    rows.append(row)
    if len(rows) > _MOST:
        raise ArgumentError(
            "the weights of this rule jump too often to be tabulated for a captured graph: "
            f"{_MOST} polynomials reach only up to update {first - 1}. {_ADVICE}"
        )
