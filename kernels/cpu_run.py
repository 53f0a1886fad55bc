"""A whole run as one native call: the check of the tensors, all launches on all threads, the count.

In a training loop the caches are full of the model, and every Python function that an update walks
through costs microseconds. Nothing can interrupt one native call either, so no signal is deferred.
"""

from __future__ import annotations

from fastema.kernels import run_table as run
from fastema.kernels import table as abi
from fastema.kernels.jit import device_fn
from fastema.kernels.words import call_long, fetch_add, load, pointer_i64, store


def run_launches(block):
    """Take rows of all launches until none is left; every thread of a run calls this.

    An OpenMP team may have more threads than take part.
    """
    words = pointer_i64(block)
    if fetch_add(block + 8 * run.ENTERED, 1) < load(words, run.LIMIT):
        launches = pointer_i64(load(words, run.LAUNCHES_AT))
        numbers = load(words, run.NUMBERS)
        for i in range(load(words, run.LAUNCHES)):
            at = i * run.LAUNCH
            call_long(
                load(launches, at + run.KERNEL),
                load(launches, at + run.TABLE),
                load(launches, at + run.ROWS),
                numbers,
                load(launches, at + run.CONTROL),
            )


@device_fn
def _begin_step(words, step):
    """Write the arguments of a step where the kernels read them."""
    row, seed = pointer_i64(step), load(words, run.SEED)
    launches = pointer_i64(load(words, run.LAUNCHES_AT))
    for i in range(load(words, run.LAUNCHES)):
        control = pointer_i64(load(launches, i * run.LAUNCH + run.CONTROL))
        store(control, abi.NEXT, 0)
        store(control, abi.SEED, seed)
        store(control, abi.STEP, load(row, run.STEP))
        store(control, abi.WINDOW, load(row, run.WINDOW))
        store(control, abi.SLOT, load(row, run.SLOT))
        store(control, abi.TURN, load(row, run.TURN))
    store(words, run.NUMBERS, step + 8 * run.FIRST_NUMBER)


@device_fn
def _threads(words, team):
    """Return the most threads for this run, and those that the OpenMP team would have."""
    most, size = load(team, run.MOST), 1
    threads = load(words, run.THREADS)
    if threads > 1 and load(team, run.PARALLEL) != 0:
        size = call_long(load(team, run.SIZE)) & 0x7FFFFFFF  # an int
        return min(threads, most if most > 0 else size), max(size, most)
    return min(load(words, run.POOL_THREADS), most if most > 0 else load(team, run.POOL)), 1


@device_fn
def _has_moved(words):
    """Return whether a check finds that a tensor is not where the tables say."""
    tasks = pointer_i64(load(words, run.WATCHES_AT))
    for i in range(load(words, run.WATCHES)):
        if call_long(load(words, run.CHECK), load(tasks, i)) != 0:
            return True
    return False


def run_program(block, number, weight):
    """Run one step of a program; return one of the codes of :mod:`fastema.kernels.run_table`.

    A step that is repeated takes its number, on which random bits depend, and the bits of its
    weight, a float64, from the call. The GIL must be held: the check needs it. The launches release
    it.
    """
    words = pointer_i64(block)
    steps, cursor = load(words, run.STEPS_AT), load(words, run.CURSOR)
    place, advance = cursor - load(words, run.FIRST), load(words, run.ADVANCE)
    if steps != 0 and place >= load(words, run.STEPS):
        return run.NO_STEP
    if _has_moved(words):
        return run.MOVED
    if steps != 0:
        step = steps + 8 * place * load(words, run.STEP_WORDS)
        row = pointer_i64(step)
        if advance == 0:
            store(row, run.STEP, number)
            store(row, run.FIRST_NUMBER, weight)
        if load(row, run.DUE) == 0:
            store(words, run.CURSOR, cursor + advance)
            return run.DONE
        _begin_step(words, step)
    team = pointer_i64(load(words, run.TEAM))
    threads, size = _threads(words, team)
    store(words, run.ENTERED, 0)
    store(words, run.LIMIT, threads)
    if threads > 1 and size == 1:
        return run.NEEDS_POOL
    python = 0
    if load(words, run.SAVE) != 0:
        python = call_long(load(words, run.SAVE))
    if threads > 1:
        # The whole team: libgomp ends threads that a smaller one leaves over, and the framework
        # would have to start them again.
        call_long(load(team, run.PARALLEL), load(words, run.SELF), block, size, 0)
    else:
        call_long(load(words, run.SELF), block)
    if load(words, run.RESTORE) != 0:
        call_long(load(words, run.RESTORE), python)
    store(words, run.CURSOR, cursor + advance)
    return run.DONE
