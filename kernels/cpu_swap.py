"""Kernels that write both sides: the swap, and the exact swap of a wide average with bf16 weights.

Bytes moved per element: both sides read and written.
"""

from __future__ import annotations

import numpy as np

from fastema.kernels import scalar
from fastema.kernels.cpu_loops import LOOPS
from fastema.kernels.formats import arithmetic
from fastema.kernels.jit import device_fn
from fastema.kernels.words import load_dst, load_src, store_dst, store_src


def swap(dst: str, src: str, layout: str):
    """Exchange the sides, each rounded to the other's format (nothing is, in raw formats)."""
    real, decode_dst, decode_src, encode_dst, encode_src = arithmetic(dst, src)

    @device_fn
    def element(to, i, of, j, w):
        kept, given = load_dst(to, i), load_src(of, j)
        store_dst(to, i, encode_dst(decode_src(given)))
        store_src(of, j, encode_src(decode_dst(kept)))

    return LOOPS[layout](element, real, dst, src)


def park(dst: str, src: str, layout: str):
    """Put a float32 average (``raw4``) into bfloat16 weights (``raw2``), losing no bit of either.

    The average's storage holds the raw weights and what the model has no room for until
    :func:`unpark`.
    """

    @device_fn
    def element(to, i, of, j, w):
        avg, weight = load_dst(to, i), load_src(of, j)
        store_src(of, j, scalar.park_model(avg))
        store_dst(to, i, scalar.park_shadow(avg, weight))

    return LOOPS[layout](element, np.float32, dst, src)


def unpark(dst: str, src: str, layout: str):
    """Undo :func:`park`."""

    @device_fn
    def element(to, i, of, j, w):
        parked, model = load_dst(to, i), load_src(of, j)
        store_src(of, j, scalar.unpark_model(parked))
        store_dst(to, i, scalar.unpark_shadow(model, parked))

    return LOOPS[layout](element, np.float32, dst, src)
