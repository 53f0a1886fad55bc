"""Kernels that write both sides: the swap, and the exact swap of a wide average with bf16 weights.

Bytes moved per element: both sides read and written.
"""

from __future__ import annotations

import numpy as np

from fastema.kernels import scalar
from fastema.kernels.cpu_loops import NOTHING, elementwise
from fastema.kernels.formats import access
from fastema.kernels.jit import device_fn
from fastema.kernels.words import load_dst, load_src, store_dst, store_src


def swap(dst: str, src: str, layout: str):
    """Exchange the sides, each rounded to the other's format (nothing is, in raw formats)."""
    real, read, write, read_src, write_src = access(dst, src)

    @device_fn
    def element(to, low, ring, of, i, j, w, word):
        kept, given = read(to, low, i), read_src(of, j)
        write(to, low, i, given, word)
        write_src(of, j, kept)
        return NOTHING

    return elementwise(element, real, dst, src, layout)


def park(dst: str, src: str, layout: str):
    """Put a float32 average (``raw4``) into bfloat16 weights (``raw2``), losing no bit of either.

    The average's storage holds the raw weights and what the model has no room for until
    :func:`unpark`.
    """

    @device_fn
    def element(to, low, ring, of, i, j, w, word):
        avg, weight = load_dst(to, i), load_src(of, j)
        store_src(of, j, scalar.park_model(avg))
        store_dst(to, i, scalar.park_shadow(avg, weight))
        return NOTHING

    return elementwise(element, np.float32, dst, src, layout)


def unpark(dst: str, src: str, layout: str):
    """Undo :func:`park`."""

    @device_fn
    def element(to, low, ring, of, i, j, w, word):
        parked, model = load_dst(to, i), load_src(of, j)
        store_src(of, j, scalar.unpark_model(parked))
        store_dst(to, i, scalar.unpark_shadow(model, parked))
        return NOTHING

    return elementwise(element, np.float32, dst, src, layout)
