"""The step counter on a GPU (a clock): the step of a run, and the weights of its averages.

A captured graph repeats the same launches, so they must find values that change from step to step
in device memory. A block of threads advances a clock to the next update.
"""

from __future__ import annotations

import numpy as np

from fastema.kernels import table as abi
from fastema.kernels.jit import device_fn
from fastema.kernels.words import load, pointer_f64, pointer_i64, store


@device_fn
def read(clock, first):
    """Load the values that all threads need before one of them writes.

    Returns the number of updates so far, the number of this call, whether to skip the update, which
    is flagged in the ``first`` of several clocks, and the cells that do not change: the first
    update, the updates between two effective ones, and the window.
    """
    cells = pointer_i64(clock)
    call, done = load(cells, abi.TRIES) + 1, load(cells, abi.DONE)
    fixed = load(cells, abi.START), load(cells, abi.EVERY), load(cells, abi.WINDOW)
    return done, call, load(pointer_i64(first), abi.NOT_FINITE) == call, fixed


@device_fn
def flag(clock):
    """Make the next call of :func:`advance` skip its update: a weight is not finite."""
    cells = pointer_i64(clock)
    store(cells, abi.NOT_FINITE, load(cells, abi.TRIES) + 1)


@device_fn
def _evaluate(table, at, count):
    """Return the polynomial of a piece at an update, by Horner's rule."""
    t = (float(count) - load(table, at + abi.FIRST)) * load(table, at + abi.SCALE) - 1.0
    value = load(table, at + abi.COEFFICIENTS + abi.DEGREE)
    k = np.int64(abi.DEGREE - 1)
    while k >= 0:
        value = value * t + load(table, at + abi.COEFFICIENTS + k)
        k -= 1
    return min(max(value, 0.0), 1.0)


@device_fn
def _look_up(address, rows, count, thread, threads):
    """Return the weight of an update to the thread that finds its piece; -1 to the others."""
    table = pointer_f64(address)
    found = -1.0
    row = thread
    while row < rows:
        at = row * abi.WEIGHT_COLUMNS
        begins = load(table, at + abi.FIRST) <= count
        if begins and (row + 1 == rows or load(table, at + abi.WEIGHT_COLUMNS + abi.FIRST) > count):
            found = _evaluate(table, at, count)
        row += threads
    return found


@device_fn
def advance(clock, before, thread, threads):
    """Advance a clock to the next update; ``before`` is the result of :func:`read`.

    The schedule is that of :meth:`fastema.rules.Schedule.weights`: nothing happens before ``START``
    and between effective steps; at ``START`` the averages become the weights; then the weight of
    each average comes from its table.
    """
    cells, numbers = pointer_i64(clock), pointer_f64(clock)
    done, call, flagged, (start, every, slots) = before
    step = done + 1
    m = step - start
    begins = m == 0
    idle = m < 0 or m % every != 0
    count = max(m // every, 1)
    skips = flagged and not idle
    if thread == 0:
        store(cells, abi.TRIES, call)
        store(cells, abi.IDLE, np.int64(1) if idle or skips else np.int64(0))
        if skips:
            store(cells, abi.SKIPPED, load(cells, abi.SKIPPED) + 1)
        else:
            store(cells, abi.DONE, step)
            store(cells, abi.STEP, step)
        if slots and not skips:
            store(numbers, abi.WEIGHTS, float(min(count, slots)))
            store(cells, abi.SLOT, (count - 1) % slots)
            store(cells, abi.TURN, np.int64(0) if begins else count)
    if not (idle or skips or slots):
        for which in range(abi.MAX_AVERAGES):
            rows = load(cells, abi.TABLES + 2 * which + 1)
            if begins:
                weight = 1.0 if thread == 0 else -1.0
            else:
                weight = _look_up(load(cells, abi.TABLES + 2 * which), rows, count, thread, threads)
            if weight >= 0.0 and rows:
                store(numbers, abi.WEIGHTS + which, weight)
