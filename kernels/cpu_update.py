"""Kernels that read one side and write the other: the update and the copy."""

from __future__ import annotations

from fastema.kernels import scalar
from fastema.kernels.cpu_loops import LOOPS
from fastema.kernels.formats import arithmetic
from fastema.kernels.jit import device_fn
from fastema.kernels.words import load_dst, load_src, store_dst


def lerp(dst: str, src: str, layout: str):
    """``dst += w * (src - dst)``, equal to ``fastema.testing.reference.lerp``.

    Bytes moved per element: the source once, the average twice.
    """
    real, decode_dst, decode_src, encode_dst, _ = arithmetic(dst, src)

    @device_fn
    def element(to, i, of, j, w):
        avg, x = decode_dst(load_dst(to, i)), decode_src(load_src(of, j))
        store_dst(to, i, encode_dst(scalar.lerp(avg, x, w)))

    return LOOPS[layout](element, real, dst, src)


def copy(dst: str, src: str, layout: str):
    """``dst = src`` in the format of ``dst``, equal to ``fastema.testing.reference.cast``."""
    real, _, decode_src, encode_dst, _ = arithmetic(dst, src)

    @device_fn
    def element(to, i, of, j, w):
        store_dst(to, i, encode_dst(decode_src(load_src(of, j))))

    return LOOPS[layout](element, real, dst, src)
