"""The loops of the CPU kernels: over rows of a table, and over the elements of a row.

A kernel is ``over_rows(body)``. Its body is mostly a walk, which loads what a step reads, applies
it, stores what it writes, and returns the sums of its three numbers; what a step does not use, the
random bits and the sums too, costs nothing.
"""

from __future__ import annotations

import numpy as np

from fastema.kernels import scalar
from fastema.kernels.formats import FORMATS
from fastema.kernels.jit import cpu_kernel, device_fn
from fastema.kernels.steps import Formats, Step
from fastema.kernels.table import (
    BLOCK,
    CLAIM,
    COLUMNS,
    COUNT,
    DISTANCE,
    DST,
    DST_STEP,
    INDEX,
    INDEX_JUMP,
    INDEX_RUN,
    INDEX_STEP,
    KEY,
    LINE,
    LOW,
    MEASURES,
    NEXT,
    PREFETCH,
    RESULTS,
    RING,
    RING_STRIDE,
    SEED,
    SQUARE,
    SRC,
    SRC_STEP,
    STEP,
    STILL,
    WHICH,
)
from fastema.kernels.words import (
    add32,
    fetch_add,
    load,
    load_dst,
    load_low,
    load_ring,
    load_src,
    low32,
    pointer_f64,
    pointer_i64,
    prefetch,
    store,
    store_dst,
    store_low,
    store_ring,
    store_src,
    sum_any_order,
)


def over_rows(body):
    """A kernel that runs ``body(cells, at, numbers, settings)`` for rows claimed from the control.

    ``cells`` is the table, ``at`` the place of the row's first column in it, ``settings`` the
    control block.
    """

    @cpu_kernel()
    def rows_loop(table, rows, numbers, control):
        cells, settings = pointer_i64(table), pointer_i64(control)
        values = pointer_f64(numbers)
        claim = load(settings, CLAIM)
        first = fetch_add(control + 8 * NEXT, claim)
        while first < rows:
            for row in range(claim):
                body(cells, (first + row) * COLUMNS, values, settings)
            first = fetch_add(control + 8 * NEXT, claim)

    return rows_loop


@device_fn
def _skip_load(pointer, i):
    return np.uint8(0)


@device_fn
def _skip_store(pointer, i, value):
    pass


_LOADS = {"d": load_dst, "l": load_low, "s": load_src, "r": load_ring}
_STORES = {"d": store_dst, "l": store_low, "s": store_src, "r": store_ring}


def single(step: Step):
    """A step on memory: the other side at ``j``, the rest at ``i``."""
    load_d, load_l, load_s, load_r = (
        word if name in step.reads else _skip_load for name, word in _LOADS.items()
    )
    store_d, store_l, store_s, store_r = (
        word if name in step.writes else _skip_store for name, word in _STORES.items()
    )
    apply = step.apply

    @device_fn
    def element(to, low, ring, of, i, j, w, word):
        d, rest, s, r, one, two, three = apply(
            load_d(to, i), load_l(low, i), load_s(of, j), load_r(ring, i), w, word
        )
        store_r(ring, i, r)
        store_d(to, i, d)
        store_l(low, i, rest)
        store_s(of, j, s)
        return one, two, three

    return element


def _stored(formats: Formats):
    """Formats of the written side, its companion, the ring and the other side; bytes for none."""
    names = formats.dst, formats.low, formats.ring, formats.src
    return tuple(FORMATS[name or "raw1"] for name in names)


def _sizes(step: Step):
    """Bytes per element that a step touches of each, 0 for what it leaves alone."""
    touched = step.reads + step.writes
    forms = zip("dlrs", _stored(step.formats), strict=True)
    return tuple(form.itemsize if name in touched else 0 for name, form in forms)


@device_fn
def row_key(cells, at, seed, step):
    """What the random bits of a row begin with."""
    return scalar.random_key(seed, step, load(cells, at + KEY), load(cells, at + INDEX))


@device_fn
def index_map(cells, at):
    """What :func:`scalar.index_of` needs for the low halves of a row's indices."""
    step, run = load(cells, at + INDEX_STEP), load(cells, at + INDEX_RUN)
    rise = low32(load(cells, at + INDEX_JUMP) - run * step)
    return low32(load(cells, at + INDEX)), low32(step), rise, np.float32(1) / np.float32(run)


@device_fn
def weight(cells, at, numbers):
    """The number that belongs to a row."""
    return load(numbers, load(cells, at + WHICH))


@device_fn
def slot_address(cells, at, slot):
    """Where a row's first element lies in a slot of the ring."""
    return load(cells, at + RING) + slot * load(cells, at + RING_STRIDE)


def _flat(step: Step, size: int = BLOCK):
    """Walk elements that are adjacent on both sides.

    Blocks of constant length and a prefetch in each stream keep the arithmetic of 16-bit formats
    overlapped with memory: measured at 25-45 % there and 5-10 % for f32. At the end of a block its
    sums leave the vectors, for which a larger one pays.
    """
    lines = size // BLOCK
    to_pointer, low_pointer, ring_pointer, of_pointer = (
        form.pointer for form in _stored(step.formats)
    )
    to_size, low_size, ring_size, of_size = _sizes(step)
    element, total = single(step), step.real

    @device_fn
    def walk(cells, at, w, settings, slot):
        dst_address, src_address = load(cells, at + DST), load(cells, at + SRC)
        low_address, ring_address = load(cells, at + LOW), slot_address(cells, at, slot)
        to, low = to_pointer(dst_address), low_pointer(low_address)
        ring, of = ring_pointer(ring_address), of_pointer(src_address)
        key = row_key(cells, at, load(settings, SEED), load(settings, STEP))
        second = scalar.mix32(key)
        index = low32(load(cells, at + INDEX))
        count = load(cells, at + COUNT)
        one, two, three = 0.0, 0.0, 0.0
        blocks = count // size
        for block in range(blocks):
            first = block * size
            a_sum, b_sum, c_sum = total(0), total(0), total(0)
            for line in range(lines * to_size):
                prefetch(dst_address + first * to_size + PREFETCH + line * LINE)
            for line in range(lines * low_size):
                prefetch(low_address + first * low_size + PREFETCH + line * LINE)
            for line in range(lines * ring_size):
                prefetch(ring_address + first * ring_size + PREFETCH + line * LINE)
            for line in range(lines * of_size):
                prefetch(src_address + first * of_size + PREFETCH + line * LINE)
            start = add32(index, low32(first))
            for k in range(size):
                word = scalar.random_word(add32(start, low32(k)), key, second)
                a, b, c = element(to, low, ring, of, first + k, first + k, w, word)
                a_sum, b_sum = sum_any_order(a_sum, a), sum_any_order(b_sum, b)
                c_sum = sum_any_order(c_sum, c)
            one, two, three = one + a_sum, two + b_sum, three + c_sum
        for i in range(blocks * size, count):
            word = scalar.random_word(add32(index, low32(i)), key, second)
            a, b, c = element(to, low, ring, of, i, i, w, word)
            one, two, three = one + a, two + b, three + c
        return one, two, three

    return walk


def _strided(step: Step, size: int = BLOCK):
    """Walk elements with any distance between them, given per row and side.

    LLVM makes vector loops of it for distances of 1, where only the indices jump: measured at 0.32
    ns per element in cache, for 0.22 of a flat walk, with bf16 averages of bf16.
    """
    to_pointer, low_pointer, ring_pointer, of_pointer = (
        form.pointer for form in _stored(step.formats)
    )
    element = single(step)

    @device_fn
    def walk(cells, at, w, settings, slot):
        to, low = to_pointer(load(cells, at + DST)), low_pointer(load(cells, at + LOW))
        ring, of = ring_pointer(slot_address(cells, at, slot)), of_pointer(load(cells, at + SRC))
        to_step, of_step = load(cells, at + DST_STEP), load(cells, at + SRC_STEP)
        key = row_key(cells, at, load(settings, SEED), load(settings, STEP))
        second = scalar.mix32(key)
        first, step, rise, inverse = index_map(cells, at)
        one, two, three = 0.0, 0.0, 0.0
        for i in range(load(cells, at + COUNT)):
            index = scalar.index_of(low32(i), first, step, rise, inverse)
            word = scalar.random_word(index, key, second)
            a, b, c = element(to, low, ring, of, i * to_step, i * of_step, w, word)
            one, two, three = one + a, two + b, three + c
        return one, two, three

    return walk


WALKS = {"flat": _flat, "strided": _strided}


def elementwise(step: Step, layout: str):
    """A kernel that walks every row once."""
    walk, real = WALKS[layout](step), step.real

    @device_fn
    def body(cells, at, numbers, settings):
        walk(cells, at, real(weight(cells, at, numbers)), settings, 0)

    return over_rows(body)


def measuring(step: Step, layout: str):
    """The same, with the sums of every row written where the control block says."""
    walk, real = WALKS[layout](step, 4 * BLOCK), step.real

    @device_fn
    def body(cells, at, numbers, settings):
        w = real(weight(cells, at, numbers))
        one, two, three = walk(cells, at, w, settings, 0)
        results = pointer_f64(load(settings, RESULTS))
        row = at // COLUMNS * MEASURES
        store(results, row + DISTANCE, one)
        store(results, row + SQUARE, two)
        store(results, row + STILL, three)

    return over_rows(body)
