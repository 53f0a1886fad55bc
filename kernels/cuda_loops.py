"""The loops of the GPU kernels: a block of threads per row, 128 bits per thread and stream.

A walk is the work of one thread on one row. A kernel passes it the thread's index in the block; a
test on the host runs all indices in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastema.kernels import cuda_memory, scalar
from fastema.kernels import table as abi
from fastema.kernels.jit import device_fn
from fastema.kernels.rows import index_map, load_companions, make_element_step, row_key, streams
from fastema.kernels.steps import Step
from fastema.kernels.words import add32, load, low32

_VECTOR = """
def vector(to, residual, ring, of, w, row, first, key, second):
    d, l, s, r = load_d(to), load_l(residual), load_s(of), load_r(ring)
{steps}
    store_r(ring, ({r}))
    store_d(to, ({d}))
    store_l(residual, ({l}))
    store_s(of, ({s}))
    return {found}
"""
_STEP = (
    "    d{k}, l{k}, s{k}, r{k}, f{k} = apply(d[{k}], l[{k}], s[{k}], r[{k}], w, "
    "random_word(word_counter(index(row, first + {k}), key), second))"
)


@device_fn
def _first_index(cells, at):
    return low32(load(cells, at + abi.INDEX))


@device_fn
def _next_index(first, place):
    return add32(first, low32(place))


@device_fn
def _mapped_index(row, place):
    first, step, rise, inverse = row
    return scalar.index_of(low32(place), first, step, rise, inverse)


_INDICES = {"flat": (_first_index, _next_index), "strided": (index_map, _mapped_index)}
"""By layout: a function that loads a row's index columns, and one that indexes an element."""


def _vector(step: Step, n: int, index):
    """Return a step on ``n`` adjacent elements, with all loads before the first store.

    The code is unrolled with one name per element, because indexing a tuple with a variable would
    move the tuple to memory.
    """
    nothing = (np.uint8(0),) * n

    @device_fn
    def skip_load(pointer):
        return nothing

    @device_fn
    def skip_store(pointer, values):
        pass

    names = {"apply": step.apply, "index": index}
    names |= {"random_word": scalar.random_word, "word_counter": scalar.word_counter}
    for letter, stream in zip("dlsr", ("dst", "residual", "src", "ring"), strict=True):
        reads, writes = letter in step.reads, letter in step.writes
        names[f"load_{letter}"] = cuda_memory.LOADS[n, stream] if reads else skip_load
        names[f"store_{letter}"] = cuda_memory.STORES[n, stream] if writes else skip_store
    parts = {letter: ", ".join(f"{letter}{k}" for k in range(n)) for letter in "dlsr"}
    found = " + ".join(f"f{k}" for k in range(n))
    steps = "\n".join(_STEP.format(k=k) for k in range(n))
    exec(_VECTOR.format(steps=steps, found=found, **parts), names)
    return device_fn(names["vector"])


def make_walks(steps: Sequence[Step], layout: str):
    """Return for every step ``walk(cells, at, w, slot, run) -> found``, for one row.

    ``run`` is the seed, the step, the index of this thread, the number of threads in the block, and
    the row's first columns: addresses of the written and of the other side, number of elements.
    Pass all steps that follow each other on a row in one call: a thread then has the same elements
    in all of them and need not wait for other threads. A thread moves as many elements at a time as
    fill 128 bits of the widest stream. Tails, and elements that are spaced or unaligned, are
    processed one by one. All slots of a ring must have the same alignment.
    """
    pointers, sizes = streams(steps)
    return [_walk(step, layout, 16 // max(sizes), sizes, pointers) for step in steps]


def _walk(step: Step, layout: str, n: int, sizes, pointers):
    of_row, index = _INDICES[layout]
    vector, element = _vector(step, n, index), make_element_step(step)
    to_pointer, residual_pointer, ring_pointer, of_pointer = pointers
    to_size, residual_size, ring_size, of_size = sizes
    # Bits that must be clear in an aligned address; none for an unused stream.
    to_mask, residual_mask, ring_mask, of_mask = (max(size * n - 1, 0) for size in sizes)

    @device_fn
    def one_by_one(cells, at, w, slot, run, first, dst_step, src_step, key, row):
        """Process elements one by one from index ``first`` on; return the sum of what they find."""
        _, _, thread, threads, (dst, src, count) = run
        beside, kept = load_companions(cells, at, slot)
        to, residual = to_pointer(dst), residual_pointer(beside)
        ring, of = ring_pointer(kept), of_pointer(src)
        second = scalar.mix32(key)
        found = 0.0
        i = first + thread
        while i < count:
            word = scalar.random_word(scalar.word_counter(index(row, i), key), second)
            found += element(to, residual, ring, of, i * dst_step, i * src_step, w, word)
            i += threads
        return found

    @device_fn
    def adjacent(cells, at, w, slot, run):
        seed, step, thread, threads, (dst, src, count) = run
        beside, kept = load_companions(cells, at, slot)
        key, row = row_key(cells, at, seed, step), of_row(cells, at)
        found = 0.0
        whole = np.int64(0)
        if (dst & to_mask) | (beside & residual_mask) | (kept & ring_mask) | (src & of_mask) == 0:
            second = scalar.mix32(key)
            whole = count // n * n
            first = thread * n
            while first < whole:
                to, residual = (
                    to_pointer(dst + first * to_size),
                    residual_pointer(beside + first * residual_size),
                )
                ring = ring_pointer(kept + first * ring_size)
                of = of_pointer(src + first * of_size)
                found += vector(to, residual, ring, of, w, row, first, key, second)
                first += threads * n
        return found + one_by_one(cells, at, w, slot, run, whole, 1, 1, key, row)

    @device_fn
    def spaced(cells, at, w, slot, run):
        dst_step, src_step = load(cells, at + abi.DST_STEP), load(cells, at + abi.SRC_STEP)
        seed, step, _, _, _ = run
        key, row = row_key(cells, at, seed, step), of_row(cells, at)
        return one_by_one(cells, at, w, slot, run, np.int64(0), dst_step, src_step, key, row)

    @device_fn
    def either(cells, at, w, slot, run):
        if load(cells, at + abi.DST_STEP) == 1 and load(cells, at + abi.SRC_STEP) == 1:
            return adjacent(cells, at, w, slot, run)
        return spaced(cells, at, w, slot, run)

    if layout == "flat":
        return adjacent
    # Adjacent elements are in a strided table only if random bits are used.
    return either if step.formats.dst.endswith("~") else spaced
