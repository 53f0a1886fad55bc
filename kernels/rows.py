"""Code shared by CPU and GPU loops: columns of a row, a step on memory, a windowed mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastema.kernels import scalar, words
from fastema.kernels import table as abi
from fastema.kernels.formats import FORMATS
from fastema.kernels.jit import device_fn
from fastema.kernels.steps import Step
from fastema.kernels.words import load, low32


@device_fn
def row_key(cells, at, seed, step):
    """Return the key of a row's random bits."""
    return scalar.random_key(seed, step, load(cells, at + abi.KEY), load(cells, at + abi.INDEX))


@device_fn
def index_map(cells, at):
    """Return the arguments of :func:`scalar.index_of` for the low halves of a row's indices."""
    step, run = load(cells, at + abi.INDEX_STEP), load(cells, at + abi.INDEX_RUN)
    rise = low32(load(cells, at + abi.INDEX_JUMP) - run * step)
    return low32(load(cells, at + abi.INDEX)), low32(step), rise, np.float32(1) / np.float32(run)


@device_fn
def load_companions(cells, at, slot):
    """Return the addresses of a row's residual and of its slot of the ring."""
    ring = load(cells, at + abi.RING) + slot * load(cells, at + abi.RING_STRIDE)
    return load(cells, at + abi.RESIDUAL), ring


@device_fn
def load_addresses(cells, at, slot):
    """Return where a row's streams begin: written side, residual, slot of the ring, other side."""
    residual, ring = load_companions(cells, at, slot)
    return load(cells, at + abi.DST), residual, ring, load(cells, at + abi.SRC)


def streams(steps: Sequence[Step]):
    """Return the pointer words and the bytes per element of each stream in :func:`load_addresses`.

    An unused stream has 0 bytes per element.
    """
    touched = "".join(step.reads + step.writes for step in steps)
    formats = steps[0].formats
    names = zip("dlrs", (formats.dst, formats.residual, formats.ring, formats.src), strict=True)
    forms = [FORMATS[name] if name and letter in touched else None for letter, name in names]
    pointers = [words.pointer_u8 if form is None else form.pointer for form in forms]
    return pointers, [0 if form is None else form.itemsize for form in forms]


@device_fn
def _skip_load(pointer, i):
    return np.uint8(0)


@device_fn
def _skip_store(pointer, i, value):
    pass


_LOADS = {"d": words.load_dst, "l": words.load_residual, "s": words.load_src, "r": words.load_ring}
_STORES = {
    "d": words.store_dst,
    "l": words.store_residual,
    "s": words.store_src,
    "r": words.store_ring,
}


def make_element_step(step: Step):
    """Return a step on memory: the other side at index ``j``, all other streams at ``i``."""
    load_d, load_l, load_s, load_r = (
        word if name in step.reads else _skip_load for name, word in _LOADS.items()
    )
    store_d, store_l, store_s, store_r = (
        word if name in step.writes else _skip_store for name, word in _STORES.items()
    )
    apply = step.apply

    @device_fn
    def element(to, residual, ring, of, i, j, w, word):
        d, rest, s, r, found = apply(
            load_d(to, i), load_l(residual, i), load_s(of, j), load_r(ring, i), w, word
        )
        store_r(ring, i, r)
        store_d(to, i, d)
        store_l(residual, i, rest)
        store_s(of, j, s)
        return found

    return element


def window_body(walks, real):
    """Return the body that updates one row of a windowed mean.

    ``walks`` are :class:`fastema.kernels.steps.WindowSteps`, ``walk(cells, at, n, slot, run)``;
    ``run`` holds further arguments of the device's walks. Every update recomputes one in ``WINDOW``
    rows from the whole ring, so that rounding errors do not accumulate.

    Bytes moved per element, f32 throughout: 4 for weights, 8 for the slot, 8 for the mean, 8 for
    its residual, and 4 for recomputed rows: 32, for any window.
    """
    slide, grow, put, begin, fold = walks

    @device_fn
    def body(cells, at, number, window, slot, turn, run):
        n = real(number)
        if turn == 1:  # ignore the previous content of the mean
            put(cells, at, n, slot, run)
            begin(cells, at, n, slot, run)
        elif turn <= window:
            grow(cells, at, n, slot, run)
        elif (at // abi.COLUMNS + turn) % window:
            slide(cells, at, n, slot, run)
        else:
            put(cells, at, n, slot, run)
            begin(cells, at, n, 0, run)
            other = np.int64(1)
            while other < window:
                fold(cells, at, real(other + 1), other, run)
                other += 1

    return body
