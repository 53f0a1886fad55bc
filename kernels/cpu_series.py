"""Moving averages of a whole series at once: rolling sums and means, exponential averages.

Every sum is kept as two floats: the rounded sum and its rounding residual. Each result is therefore
rounded only once or twice from the exact one.
"""

from __future__ import annotations

import math

from fastema.kernels.jit import device_fn
from fastema.kernels.series_table import (
    COLUMNS,
    COUNT,
    DIVIDE,
    DST,
    ENTERED,
    LANES,
    NEXT,
    ODD,
    PLACES,
    PREV,
    ROOM,
    SEEN,
    SIZE,
    SRC,
    STRETCH,
)
from fastema.kernels.words import (
    fetch_add,
    fma,
    load,
    load_dst,
    load_src,
    nan_to_zero,
    pointer_f64,
    pointer_i64,
    store,
    store_dst,
    store_src,
    sum_any_order,
)


@device_fn
def _rounding_error(x, y, total):
    """Return the rounding error of ``total = x + y``; 0 if it is not finite."""
    took = total - x
    return nan_to_zero((x - (total - took)) + (y - took))


@device_fn
def _add_pairs(high, low, more, more_low):
    """Return the sum of two numbers that are two floats each, as two floats."""
    total = high + more
    return total, low + more_low + _rounding_error(high, more, total)


# -- windows joined from the end of one block of values and the beginning of the next --------------


@device_fn
def _join_windows(cells, at, size, divide, scratch):
    """Write the results of any row; return 0 if all are finite, otherwise NaN.

    Nothing is ever subtracted: a value that has left the window, even an infinity, has no effect.
    """
    src, prev = load(cells, at + SRC), load(cells, at + PREV)
    dst, count = pointer_f64(load(cells, at + DST)), load(cells, at + COUNT)
    seen = load(cells, at + SEEN)
    back, back_rests = pointer_f64(scratch), pointer_f64(scratch + 8 * size)
    odd = 0.0
    for begin in range(0, count, size):
        new, old = pointer_f64(src + 8 * begin), pointer_f64(prev)
        high, low = 0.0, 0.0
        for i in range(size - 1, -1, -1):  # without the value at i, which has left the window
            store(back, i, high)
            store(back_rests, i, low)
            high, low = _add_pairs(high, low, load(old, i), 0.0)
        high, low = 0.0, 0.0
        for i in range(min(size, count - begin)):
            high, low = _add_pairs(high, low, load(new, i), 0.0)
            total, rest = _add_pairs(high, low, load(back, i), load(back_rests, i))
            result = total + rest
            if divide:
                result /= float(min(seen + begin + i + 1, size))
            store(dst, begin + i, result)
            odd += result * 0.0
        prev = src + 8 * begin
    return odd


# -- windows that slide: the value that comes in minus the one that leaves -------------------------
#
# Every value is split in two parts. The first is a multiple of a unit so large that sums of all
# first parts are exact (S. Rump, T. Ogita and S. Oishi, Accurate floating-point summation, 2008).
# The second parts are so small that the rounding of their sums is negligible, except where values
# of very different sizes meet: the windows of such rows are joined instead.


@device_fn
def _sizes(values, first, count):
    """Return the sum of absolute values, in any order."""
    total = 0.0
    for i in range(first, first + count):
        total = sum_any_order(total, abs(load_src(values, i)))
    return total


@device_fn
def _power_above(x):
    """Return the least power of two above a positive number; NaN for the largest (Rump, 2008)."""
    scaled = x * 2.0**53
    power = (scaled + x) - scaled
    return power if power > x else x + x


@device_fn
def _split_total(values, first, count, shift):
    """Return the sum of values as a multiple of the unit, and the residual."""
    whole, rest = 0.0, 0.0
    for i in range(first, first + count):
        x = load_src(values, i)
        x_first = (x + shift) - shift
        whole, rest = sum_any_order(whole, x_first), sum_any_order(rest, x - x_first)
    return whole, rest


@device_fn
def _split_differences(new, old, at, differences, rests, first, count, shift):
    for i in range(count):
        x, y = load_src(new, at + i), load_src(old, at + i)
        x_first, y_first = (x + shift) - shift, (y + shift) - shift
        store_dst(differences, first + i, x_first - y_first)
        store_dst(rests, first + i, (x - x_first) - (y - y_first))


@device_fn
def _running_sums(firsts, rests, count, sums):
    """Replace both parts by running sums, in four lanes since each sum waits for the last one."""
    a, a_rest, b, b_rest, c, c_rest, d, d_rest = sums
    for i in range(count):
        a += load_src(firsts, i)
        b += load_src(firsts, STRETCH + i)
        c += load_src(firsts, 2 * STRETCH + i)
        d += load_src(firsts, 3 * STRETCH + i)
        a_rest += load_dst(rests, i)
        b_rest += load_dst(rests, STRETCH + i)
        c_rest += load_dst(rests, 2 * STRETCH + i)
        d_rest += load_dst(rests, 3 * STRETCH + i)
        store_src(firsts, i, a)
        store_src(firsts, STRETCH + i, b)
        store_src(firsts, 2 * STRETCH + i, c)
        store_src(firsts, 3 * STRETCH + i, d)
        store_dst(rests, i, a_rest)
        store_dst(rests, STRETCH + i, b_rest)
        store_dst(rests, 2 * STRETCH + i, c_rest)
        store_dst(rests, 3 * STRETCH + i, d_rest)
    return a, a_rest, b, b_rest, c, c_rest, d, d_rest


@device_fn
def _write_slid_sums(dst, at, sums, rests, first, count, n, inverse, least):
    """Write sums divided by ``n``; return how many may be inexact or not finite."""
    odd = 0.0
    for i in range(count):
        whole = load_src(sums, first + i) + load_src(rests, first + i)
        guess = whole * inverse
        store_dst(dst, at + i, fma(fma(-guess, n, whole), inverse, guess))
        odd = sum_any_order(odd, 0.0 if abs(whole) >= least else 1.0)
    return odd


@device_fn
def _slide(cells, at, size, divide, scratch):
    """Write the results of a row that continues full windows; return 0 if all are exact."""
    src, prev = pointer_f64(load(cells, at + SRC)), pointer_f64(load(cells, at + PREV))
    dst, count = pointer_f64(load(cells, at + DST)), load(cells, at + COUNT)
    lane = count // LANES
    part = 8 * LANES * STRETCH
    differences, rests = pointer_f64(scratch), pointer_f64(scratch + part)
    sizes = _sizes(prev, 0, size + count)
    if lane == 0 or not sizes < math.inf:
        return math.nan
    top = _power_above(sizes)
    shift = 6.0 * top
    least = float(lane) * float(size) * 2.0**-48 * top
    n = float(size) if divide else 1.0
    inverse = 1.0 / n
    a, a_rest = _split_total(prev, 0, size, shift)
    b, b_rest = _split_total(prev, lane, size, shift)
    c, c_rest = _split_total(prev, 2 * lane, size, shift)
    d, d_rest = _split_total(prev, 3 * lane, size, shift)
    sums = a, a_rest, b, b_rest, c, c_rest, d, d_rest
    odd = 0.0
    for first in range(0, lane, STRETCH):
        now = min(STRETCH, lane - first)
        for k in range(LANES):
            place = k * lane + first
            _split_differences(src, prev, place, differences, rests, k * STRETCH, now, shift)
        sums = _running_sums(differences, rests, now, sums)
        for k in range(LANES):
            place = k * lane + first
            odd += _write_slid_sums(
                dst, place, differences, rests, k * STRETCH, now, n, inverse, least
            )
    for i in range(LANES * lane, count):
        whole, rest = _split_total(prev, i + 1, size, shift)
        store(differences, 0, whole)
        store(rests, 0, rest)
        odd += _write_slid_sums(dst, i, differences, rests, 0, 1, n, inverse, least)
    return odd


def rolling_mean(table, rows, scratch, control):
    """Write means, or sums, of the last ``SIZE`` values, at every value of every row."""
    cells, settings = pointer_i64(table), pointer_i64(control)
    size, divide = load(settings, SIZE), load(settings, DIVIDE)
    place = fetch_add(control + 8 * ENTERED, 1)
    if place >= load(settings, PLACES):
        return  # the others do the work
    scratch += place * load(settings, ROOM)
    row = fetch_add(control + 8 * NEXT, 1)
    while row < rows:
        at = row * COLUMNS
        follows = load(cells, at + PREV) + 8 * size == load(cells, at + SRC)
        follows = follows and load(cells, at + SEEN) == size
        odd = _slide(cells, at, size, divide, scratch) if follows else math.nan
        if odd != 0.0:
            odd = _join_windows(cells, at, size, divide, scratch)
        store(cells, at + ODD, 0 if odd == 0.0 else 1)
        row = fetch_add(control + 8 * NEXT, 1)


# -- exponential averages -------------------------------------------------------------------------


@device_fn
def _ewm_stretch(src, dst, sums, rests, first, count, decay, w, w_rest, high, low):
    """Average ``count`` values; only one product and one sum per value wait for the last value."""
    before = high
    for i in range(count):
        high = decay * high + w * load_src(src, first + i)
        store_dst(sums, i, high)
    for i in range(count):
        then = before if i == 0 else load_src(sums, i - 1)
        x = load_src(src, first + i)
        old, new = decay * then, w * x
        rest = fma(decay, then, -old) + (fma(w, x, -new) + w_rest * x)
        store_dst(rests, i, nan_to_zero(rest) + _rounding_error(old, new, old + new))
    for i in range(count):
        low = fma(decay, low, load_src(rests, i))
        store_dst(dst, first + i, load_src(sums, i) + low)
    return high, low


def ewm_mean(source, count, target, numbers, scratch):
    """Write ``avg = decay avg + (1 - decay) x`` for every value.

    ``numbers`` is ``float64[3]``: the decay, the average before and its residual; the last two are
    updated. ``scratch`` has room for two stretches.
    """
    src, dst, values = pointer_f64(source), pointer_f64(target), pointer_f64(numbers)
    decay, high, low = load(values, 0), load(values, 1), load(values, 2)
    w = 1.0 - decay
    w_rest = (1.0 - w) - decay
    sums, rests = pointer_f64(scratch), pointer_f64(scratch + 8 * STRETCH)
    first = 0
    while first < count:
        now = min(STRETCH, count - first)
        high, low = _ewm_stretch(src, dst, sums, rests, first, now, decay, w, w_rest, high, low)
        first += now
    store(values, 1, high)
    store(values, 2, low)
