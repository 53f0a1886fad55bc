"""Running averages of a whole series at once: windowed sums and means, exponential averages.

Both work on sums of two floats, of which the second holds what the first one rounded off, so that
each result is rounded once or twice from the exact one.

A series is cut into rows, which threads take from one cursor. Table, ``int64[rows, COLUMNS]``:

===========  ====================================================================================
``SRC``      address of the row's first value
``PREV``     address of the ``size`` values before it, zeros where there were none
``DST``      address of the row's first result
``COUNT``    values in the row
``SEEN``     values before the row, as far as they are in its first window: at most ``size``
``ODD``      written: 1 where a result is not finite, else 0
===========  ====================================================================================

Control, ``int64[CONTROLS]``: ``NEXT``, the next row to take; ``SIZE``, that of the window; and
``MEAN``, 1 where sums are to be divided by how many values they are of.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import types

from fastema.kernels.jit import cpu_kernel, device_fn
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

SRC: Final = 0
PREV: Final = 1
DST: Final = 2
COUNT: Final = 3
SEEN: Final = 4
ODD: Final = 5
COLUMNS: Final = 6

NEXT: Final = 0
SIZE: Final = 1
MEAN: Final = 2
CONTROLS: Final = 3

LANES: Final = 4
"""Running sums that are worked on at a time, since each waits for its last addition."""

LANE: Final = 64
"""Most values in a lane where sums are put together anew."""

STRETCH: Final = 128
"""Values of a lane worked on in turn where sums slide: what is between stays in the cache."""


@device_fn
def _rounded_off(x, y, total):
    """What ``total = x + y`` rounded off; 0 for what is not finite."""
    took = total - x
    return nan_to_zero((x - (total - took)) + (y - took))


@device_fn
def _added(high, low, more, more_low):
    """The sum of two sums of two floats each."""
    total = high + more
    return total, low + more_low + _rounded_off(high, more, total)


@device_fn
def _divided(total, rest, n, inverse):
    """``(total + rest) / n`` rounded as a division of the rounded sum; ``inverse = 1 / n``."""
    whole = total + rest
    guess = whole * inverse
    better = fma(fma(-guess, n, whole), inverse, guess)
    return better if better == better else guess  # infinities have no remainder


@device_fn
def _finished(dst, first, sums, rests, at, count, before, size, mean):
    """Write ``count`` results; a number that is 0 if all are finite, otherwise NaN."""
    odd = 0.0
    if mean == 0:
        for i in range(count):
            result = load_src(sums, at + i) + load_src(rests, at + i)
            store_dst(dst, first + i, result)
            odd = sum_any_order(odd, result * 0.0)
        return odd
    growing = min(max(size - before - first, 0), count)  # windows that are not full yet
    for i in range(growing):
        total = load_src(sums, at + i) + load_src(rests, at + i)
        result = total / float(before + first + i + 1)
        store_dst(dst, first + i, result)
        odd += result * 0.0
    n = float(size)
    inverse = 1.0 / n
    for i in range(growing, count):
        result = _divided(load_src(sums, at + i), load_src(rests, at + i), n, inverse)
        store_dst(dst, first + i, result)
        odd = sum_any_order(odd, result * 0.0)
    return odd


@device_fn
def _total(values, first, count):
    """The sum of values one after the other."""
    high, low = 0.0, 0.0
    for i in range(first, first + count):
        high, low = _added(high, low, load(values, i), 0.0)
    return high, low


# -- windows put together: the end of one block of values and the beginning of the next ------------


@device_fn
def _scans(new, old, front, back, lane):
    """Running sums of every lane: of ``new`` from the front, of ``old`` from behind.

    Those from behind leave out the value at their own place, which has left the window.
    """
    a, b, c, d = 0, lane, 2 * lane, 3 * lane
    front_a = front_b = front_c = front_d = 0.0
    back_a = back_b = back_c = back_d = 0.0
    for i in range(lane):
        front_a += load_src(new, a + i)
        front_b += load_src(new, b + i)
        front_c += load_src(new, c + i)
        front_d += load_src(new, d + i)
        store_dst(front, a + i, front_a)
        store_dst(front, b + i, front_b)
        store_dst(front, c + i, front_c)
        store_dst(front, d + i, front_d)
        j = lane - 1 - i
        store_dst(back, a + j, back_a)
        store_dst(back, b + j, back_b)
        store_dst(back, c + j, back_c)
        store_dst(back, d + j, back_d)
        back_a += load_src(old, a + j)
        back_b += load_src(old, b + j)
        back_c += load_src(old, c + j)
        back_d += load_src(old, d + j)


@device_fn
def _losses(new, old, front, back, front_rests, back_rests, first, lane):
    """What the running sums of a lane round off up to each place, as they run; all of the front's.

    The two are never mixed: what belongs to values that have left the window has to leave with
    them.
    """
    lost = 0.0
    store_dst(front_rests, first, lost)
    for i in range(first + 1, first + lane):
        lost += _rounded_off(load_src(front, i - 1), load_src(new, i), load_src(front, i))
        store_dst(front_rests, i, lost)
    behind = 0.0
    for i in range(first + lane - 1, first, -1):
        store_dst(back_rests, i, behind)
        behind += _rounded_off(load_src(back, i), load_src(old, i), load_src(back, i - 1))
    store_dst(back_rests, first, behind)
    return lost


@device_fn
def _combined(front, back, rests, back_rests, first, lane, base, base_rest):
    """Sums of whole windows in the place of those from the front."""
    for i in range(first, first + lane):
        x, y = load_dst(front, i), load_src(back, i)
        part = x + y
        total = part + base
        rest = _rounded_off(x, y, part) + _rounded_off(part, base, total)
        rest += load_dst(rests, i) + load_src(back_rests, i)
        store_dst(front, i, total)
        store_dst(rests, i, rest + base_rest)


@device_fn
def _padded(values, count, to, length):
    """Values with zeros behind them."""
    for i in range(count):
        store_dst(to, i, load_src(values, i))
    for i in range(count, length):
        store_dst(to, i, 0.0)


@device_fn
def _together(cells, at, size, mean, scratch):
    """The results of a row; a number that is 0 if all are finite, otherwise NaN."""
    src, prev = load(cells, at + SRC), load(cells, at + PREV)
    dst = pointer_f64(load(cells, at + DST))
    count, seen = load(cells, at + COUNT), load(cells, at + SEEN)
    groups = (size - 1) // (LANES * LANE) + 1
    lane = (size - 1) // (LANES * groups) + 1
    lanes, group = LANES * groups, LANES * lane
    part = 8 * LANES * LANE
    front, back = pointer_f64(scratch), pointer_f64(scratch + part)
    rests, back_rests = pointer_f64(scratch + 2 * part), pointer_f64(scratch + 3 * part)
    room_new, room_old = scratch + 4 * part, scratch + 5 * part
    totals = pointer_f64(scratch + 6 * part)  # of the lanes of a block: sums, what they round off,
    bases = pointer_f64(scratch + 6 * part + 16 * lanes)  # and the same of all lanes behind one
    for i in range(lanes):
        first = min(i * lane, size)
        high, low = _total(pointer_f64(prev), first, min(lane, size - first))
        store(totals, 2 * i, high)
        store(totals, 2 * i + 1, low)
    odd = 0.0
    done = 0
    while done < count:
        high, low = 0.0, 0.0
        for i in range(lanes - 1, -1, -1):
            store(bases, 2 * i, high)
            store(bases, 2 * i + 1, low)
            high, low = _added(high, low, load(totals, 2 * i), load(totals, 2 * i + 1))
        high, low = 0.0, 0.0
        begin = 0
        while begin < size and done + begin < count:
            results = min(group, size - begin, count - done - begin)
            new_at, old_at = src + 8 * (done + begin), prev + 8 * begin
            if results < group:
                _padded(pointer_f64(new_at), results, pointer_f64(room_new), group)
                _padded(pointer_f64(old_at), min(group, size - begin), pointer_f64(room_old), group)
                new_at, old_at = room_new, room_old
            new, old = pointer_f64(new_at), pointer_f64(old_at)
            _scans(new, old, front, back, lane)
            for k in range(LANES):
                i, at_lane = begin // lane + k, k * lane
                lost = _losses(new, old, front, back, rests, back_rests, at_lane, lane)
                last = load(front, at_lane + lane - 1)
                base, rest = _added(high, low, load(bases, 2 * i), load(bases, 2 * i + 1))
                high, low = _added(high, low, last, lost)
                store(totals, 2 * i, last)
                store(totals, 2 * i + 1, lost)
                _combined(front, back, rests, back_rests, at_lane, lane, base, rest)
            odd += _finished(dst, done + begin, front, rests, 0, results, seen, size, mean)
            begin += group
        prev = src + 8 * done
        done += size
    return odd


# -- windows that slide: the value that comes in minus the one that leaves -------------------------
#
# Every value is split in two, of which the first is a multiple of a unit so large that sums of all
# first parts are exact (S. Rump, T. Ogita and S. Oishi, Accurate floating-point summation, 2008).
# The second parts are then so small that what their sums round off is out of sight, except where
# values of very different sizes meet: such rows are put together instead.


@device_fn
def _sizes(values, first, count):
    """The sum of absolute values, in any order."""
    total = 0.0
    for i in range(first, first + count):
        total = sum_any_order(total, abs(load_src(values, i)))
    return total


@device_fn
def _split_total(values, first, count, shift):
    """The sum of values as a multiple of the unit, and the rest."""
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
    """Of four lanes and both parts at a time, since each sum waits for the one before; in place."""
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
def _slid(dst, at, sums, rests, first, count, n, inverse, least):
    """Write sums divided by ``n``; the number of those that may not be exact, or not finite."""
    odd = 0.0
    for i in range(count):
        whole = load_src(sums, first + i) + load_src(rests, first + i)
        guess = whole * inverse
        store_dst(dst, at + i, fma(fma(-guess, n, whole), inverse, guess))
        odd = sum_any_order(odd, 0.0 if abs(whole) >= least else 1.0)
    return odd


@device_fn
def _slide(cells, at, size, mean, scratch):
    """Those of a row whose windows are full and that continues ``PREV``; 0 if all are exact."""
    src, prev = pointer_f64(load(cells, at + SRC)), pointer_f64(load(cells, at + PREV))
    dst, count = pointer_f64(load(cells, at + DST)), load(cells, at + COUNT)
    lane = count // LANES
    part = 8 * LANES * STRETCH
    differences, rests = pointer_f64(scratch), pointer_f64(scratch + part)
    sizes = _sizes(prev, 0, size + count)
    if lane == 0 or not sizes < math.inf:
        return math.nan
    power = math.frexp(sizes)[1]
    shift = math.ldexp(1.5, power + 2)
    least = math.ldexp(float(lane) * float(size), power + 2 - 50)
    n = float(size) if mean else 1.0
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
            odd += _slid(dst, place, differences, rests, k * STRETCH, now, n, inverse, least)
    for i in range(LANES * lane, count):
        whole, rest = _split_total(prev, i + 1, size, shift)
        store(differences, 0, whole)
        store(rests, 0, rest)
        odd += _slid(dst, i, differences, rests, 0, 1, n, inverse, least)
    return odd


@cpu_kernel()
def windowed(table, rows, numbers, control):
    """Sums or means of the last ``SIZE`` values, at every value of every row."""
    cells, settings = pointer_i64(table), pointer_i64(control)
    size, mean = load(settings, SIZE), load(settings, MEAN)
    lanes = LANES * ((size - 1) // (LANES * LANE) + 1)
    room = np.empty(max(3 * LANES * STRETCH, 6 * LANES * LANE + 4 * lanes))
    scratch = np.int64(room.ctypes.data)
    row = fetch_add(control + 8 * NEXT, 1)
    while row < rows:
        at = row * COLUMNS
        follows = load(cells, at + PREV) + 8 * size == load(cells, at + SRC)
        follows = follows and load(cells, at + SEEN) == size
        odd = _slide(cells, at, size, mean, scratch) if follows else math.nan
        if odd != 0.0:
            odd = _together(cells, at, size, mean, scratch)
        store(cells, at + ODD, 0 if odd == 0.0 else 1)
        row = fetch_add(control + 8 * NEXT, 1)
    room[0] = 0.0  # Numba frees an array after its last use, and an address is none


# -- exponential averages -------------------------------------------------------------------------


@device_fn
def _decayed_stretch(src, dst, sums, rests, first, count, decay, w, w_rest, high, low):
    """The recursion of ``count`` values: one product and one sum each wait for the one before."""
    before = high
    for i in range(count):
        high = decay * high + w * load_src(src, first + i)
        store_dst(sums, i, high)
    for i in range(count):
        then = before if i == 0 else load_src(sums, i - 1)
        x = load_src(src, first + i)
        old, new = decay * then, w * x
        rest = fma(decay, then, -old) + (fma(w, x, -new) + w_rest * x)
        store_dst(rests, i, nan_to_zero(rest) + _rounded_off(old, new, old + new))
    for i in range(count):
        low = fma(decay, low, load_src(rests, i))
        store_dst(dst, first + i, load_src(sums, i) + low)
    return high, low


@cpu_kernel(types.void(*[types.int64] * 4))
def decayed(source, count, target, numbers):
    """``avg = decay avg + (1 - decay) x`` for every value.

    ``numbers``, ``float64[3]``: the decay, the average before and what it rounded off; the last two
    are written.
    """
    src, dst, values = pointer_f64(source), pointer_f64(target), pointer_f64(numbers)
    decay, high, low = load(values, 0), load(values, 1), load(values, 2)
    w = 1.0 - decay
    w_rest = (1.0 - w) - decay
    room = np.empty(2 * STRETCH)
    sums, rests = pointer_f64(room.ctypes.data), pointer_f64(room.ctypes.data + 8 * STRETCH)
    first = 0
    while first < count:
        now = min(STRETCH, count - first)
        high, low = _decayed_stretch(src, dst, sums, rests, first, now, decay, w, w_rest, high, low)
        first += now
    store(values, 1, high)
    store(values, 2, low)
    room[0] = 0.0  # Numba frees an array after its last use, and an address is none
