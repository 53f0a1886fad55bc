"""The windowed mean: one pass over weights, mean and the oldest slot of a ring.

The mean is kept as a sum of two floats, so that taking out what once went in leaves next to
nothing behind; and at every update one in ``WINDOW`` rows is computed afresh from the whole ring,
so that even that is forgotten.

Bytes moved per element, f32 throughout: 4 weights, 8 slot, 8 mean, 8 its companion, and 4 for the
rows computed afresh: 32, whatever the window.
"""

from __future__ import annotations

import numpy as np

from fastema.kernels import scalar
from fastema.kernels.cpu_loops import NOTHING, WALKS, Streams, over_rows, weight
from fastema.kernels.formats import FORMATS, access
from fastema.kernels.jit import device_fn
from fastema.kernels.table import COLUMNS, SLOT, TURN, WINDOW
from fastema.kernels.words import (
    load,
    load_low,
    load_ring,
    nan_to_zero,
    store_low,
    store_ring,
)


def window(dst: str, src: str, ring: str, low: str, layout: str):
    """The mean of the last ``WINDOW`` values of ``src``, as they are stored in the ring.

    ``low`` is what the companion is made of, f32 or f64: memory of its own, which does not become
    wider with the weights.

    The number of a row is how many values the mean is of: those there are, while the ring fills.
    """
    real, read, write, read_src, _ = access(dst, src)
    wide = "f64" in (dst, src)
    recall = FORMATS[ring].decode
    keep = FORMATS[ring].encode_wide if wide else FORMATS[ring].encode
    as_rest = np.float64 if low == "f64" else np.float32
    streams = Streams(dst, src, low=low, ring=ring)

    @device_fn
    def step(to, low, i, x, old, old_rest, n, word):
        """``mean += (x - old) / n``; the companion keeps what the mean has no room for."""
        avg, rest = read(to, low, i), real(load_low(low, i))
        mean, left = scalar.mean_step(avg, rest, x, old, old_rest, n, real(1) / n)
        write(to, low, i, mean, word)
        store_low(low, i, as_rest(nan_to_zero((mean - read(to, low, i)) + left)))

    @device_fn
    def store_newest(ring, of, i, j, word):
        stored = keep(read_src(of, j), word)
        store_ring(ring, i, stored)
        return real(recall(stored))

    @device_fn
    def slide(to, low, ring, of, i, j, n, word):
        old = real(recall(load_ring(ring, i)))
        step(to, low, i, store_newest(ring, of, i, j, word), old, real(0), n, word)
        return NOTHING

    @device_fn
    def grow(to, low, ring, of, i, j, n, word):
        x = store_newest(ring, of, i, j, word)
        step(to, low, i, x, read(to, low, i), real(load_low(low, i)), n, word)
        return NOTHING

    @device_fn
    def put(to, low, ring, of, i, j, n, word):
        store_newest(ring, of, i, j, word)
        return NOTHING

    @device_fn
    def begin(to, low, ring, of, i, j, n, word):
        x = real(recall(load_ring(ring, i)))
        write(to, low, i, x, word)
        store_low(low, i, as_rest(nan_to_zero(x - read(to, low, i))))
        return NOTHING

    @device_fn
    def fold(to, low, ring, of, i, j, n, word):
        x = real(recall(load_ring(ring, i)))
        step(to, low, i, x, read(to, low, i), real(load_low(low, i)), n, word)
        return NOTHING

    slide_all, grow_all, put_all, begin_all, fold_all = (
        WALKS[layout](element, streams) for element in (slide, grow, put, begin, fold)
    )

    @device_fn
    def body(cells, at, numbers, settings):
        n = real(weight(cells, at, numbers))
        slots, slot = load(settings, WINDOW), load(settings, SLOT)
        turn = load(settings, TURN)
        if turn == 1:  # whatever the mean held before
            put_all(cells, at, n, settings, slot)
            begin_all(cells, at, n, settings, slot)
        elif turn <= slots:
            grow_all(cells, at, n, settings, slot)
        elif (at // COLUMNS + turn) % slots:
            slide_all(cells, at, n, settings, slot)
        else:
            put_all(cells, at, n, settings, slot)
            begin_all(cells, at, n, settings, 0)
            for other in range(1, slots):
                fold_all(cells, at, real(other + 1), settings, other)

    return over_rows(body)
