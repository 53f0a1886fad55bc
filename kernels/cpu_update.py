"""Kernels that read one side and write the other, or only look: update, copy, search for NaN."""

from __future__ import annotations

import numpy as np

from fastema.kernels import scalar
from fastema.kernels.cpu_loops import NOTHING, elementwise, measuring
from fastema.kernels.formats import access
from fastema.kernels.jit import device_fn


def lerp(dst: str, src: str, layout: str):
    """``dst += w * (src - dst)``, equal to ``fastema.testing.reference.lerp``.

    Bytes moved per element: the source once, the average twice.
    """
    real, read, write, read_src, _ = access(dst, src)

    @device_fn
    def element(to, low, ring, of, i, j, w, word):
        write(to, low, i, scalar.lerp(read(to, low, i), read_src(of, j), w), word)
        return NOTHING

    return elementwise(element, real, dst, src, layout)


def lerp_measured(dst: str, src: str, layout: str):
    """:func:`lerp`, and how far the weights are then, and how many elements stood still."""
    real, read, write, read_src, _ = access(dst, src)

    @device_fn
    def element(to, low, ring, of, i, j, w, word):
        before, x = read(to, low, i), read_src(of, j)
        write(to, low, i, scalar.lerp(before, x, w), word)
        after = read(to, low, i)
        distance = x - after
        still = real(1) if after == before else real(0)
        return distance * distance, after * after, still

    return measuring(element, real, dst, src, layout)


def add(dst: str, src: str, layout: str):
    """``dst += w * src``: the terms of a weighted sum, one call or row after the other."""
    real, read, write, read_src, _ = access(dst, src)

    @device_fn
    def element(to, low, ring, of, i, j, w, word):
        write(to, low, i, scalar.fma(w, read_src(of, j), read(to, low, i)), word)
        return NOTHING

    return elementwise(element, real, dst, src, layout)


def copy(dst: str, src: str, layout: str):
    """``dst = src`` in the format of ``dst``, equal to ``fastema.testing.reference.cast``."""
    real, _, write, read_src, _ = access(dst, src)

    @device_fn
    def element(to, low, ring, of, i, j, w, word):
        write(to, low, i, read_src(of, j), word)
        return NOTHING

    return elementwise(element, real, dst, src, layout)


def give(dst: str, src: str, layout: str):
    """``src = dst`` in the format of ``src``: the way back, where ``dst`` has a companion."""
    real, read, _, _, write_src = access(dst, src)

    @device_fn
    def element(to, low, ring, of, i, j, w, word):
        write_src(of, j, read(to, low, i))
        return NOTHING

    return elementwise(element, real, dst, src, layout)


def finite(dst: str, src: str, layout: str):
    """How many elements of the source are NaN or infinite, in ``DISTANCE``; nothing is written.

    Bytes moved: the source once.
    """
    real, _, _, read_src, _ = access(dst, src)
    largest = real(np.finfo(real).max)

    @device_fn
    def element(to, low, ring, of, i, j, w, word):
        x = read_src(of, j)
        return (real(0) if abs(x) <= largest else real(1)), real(0), real(0)

    return measuring(element, real, dst, src, layout)
