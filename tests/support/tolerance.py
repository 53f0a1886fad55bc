"""Error bounds of results against exact arithmetic, for each pair of formats.

Every bound is derived from the roundings in :mod:`tests.support.reference`; none is a measured
error plus a margin. ``u`` is a format's unit roundoff, half the distance from 1 to the next number.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reference import FLOATS, decode, real_of, real_of_storage

__all__ = ["cast_bound", "lerp_bound", "lerp_in_long_double", "unit_roundoff"]

Array = NDArray[Any]
Reals = NDArray[np.float64]


def unit_roundoff(code: str) -> float:
    """Return the largest relative error of rounding a number to a format."""
    return float(2.0 ** -FLOATS[real_of(code)].digits)


def cast_bound(exact: Reals, code: str) -> Reals:
    """Return the largest rounding error: ``u * |exact|``, or half a subnormal step."""
    form = FLOATS[real_of(code)]
    return np.maximum(unit_roundoff(code) * np.abs(exact), form.smallest / 2)


def _reals(stored: Array, code: str) -> NDArray[np.longdouble]:
    return decode(stored.view(real_of_storage(code)), real_of(code)).astype(np.longdouble)


def lerp_in_long_double(
    avg: Array, x: Array, w: float, dst: str, src: str
) -> NDArray[np.longdouble]:
    """Return ``avg + w * (x - avg)`` of stored arrays in long double.

    Complex numbers come as pairs of reals along the last axis.
    """
    old, new = _reals(avg, dst), _reals(x, src)
    return old + np.longdouble(w) * (new - old)


def lerp_bound(avg: Array, x: Array, w: float, dst: str, src: str) -> Reals:
    """Return the largest error of an update against ``r = avg + w * d``, ``d = x - avg``.

    Let ``u`` be that of the computation: float64 if either side is, otherwise float32. Rounding the
    weight and the difference costs ``2 * u * |w * d|``, the fused multiply-add ``u * |r|``, and
    storing a 16-bit result ``u * |r|`` of that format. The bound holds where nothing overflows.
    """
    computed = "f64" if "f64" in (real_of(dst), real_of(src)) else "f32"
    u = unit_roundoff(computed)
    old, new = _reals(avg, dst), _reals(x, src)
    moved = np.abs(w * (new - old)).astype(np.float64)
    result = np.abs(lerp_in_long_double(avg, x, w, dst, src)).astype(np.float64)
    bound = 2 * u * moved + cast_bound(result, computed)
    if real_of(dst) != computed:
        bound += cast_bound(result + bound, dst)
    # lerp_in_long_double's own error, where long double is no wider than double.
    bound += 2 * float(np.finfo(np.longdouble).eps) * (np.abs(old).astype(np.float64) + moved)
    # Products of two roundings: u and the other errors are all far below 2 ** -6.
    return np.asarray(bound * (1 + 2.0**-6), np.float64)
