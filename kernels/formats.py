"""How each element format lies in memory: its pointer, and its way to and from arithmetic.

A new dtype is one row here (and one in ``fastema.layout.dtypes``).
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np

from fastema.kernels import scalar, words
from fastema.kernels.jit import device_fn


class Format(NamedTuple):
    """One stored format.

    ``decode(stored)`` gives a float32 (a float64 for f64); ``encode(value)`` takes a float32 and
    ``encode_wide(value)`` a float64, each rounding once to nearest even. Raw formats are moved, not
    computed with.
    """

    itemsize: int
    pointer: Callable[..., Any]
    decode: Callable[..., Any]
    encode: Callable[..., Any]
    encode_wide: Callable[..., Any]


def _converts_half() -> bool:
    """Whether the CPU has half conversions; where not, LLVM would call a missing library."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return bool(llvmlite.binding.get_host_cpu_features().get("f16c"))


_decode_half, _encode_half = (
    (words.half_to_float, words.float_to_half)
    if _converts_half()
    else (scalar.decode_f16, scalar.encode_f16)
)


@device_fn
def _same(value):
    return value


@device_fn
def _narrow(value):
    return np.float32(value)


@device_fn
def _widen(value):
    return np.float64(value)


@device_fn
def _wide_to_bf16(value):
    return scalar.encode_bf16(scalar.round_to_odd(value))


@device_fn
def _wide_to_half(value):
    return _encode_half(scalar.round_to_odd(value))


def _raw(itemsize, pointer):
    return Format(itemsize, pointer, _same, _same, _same)


FORMATS = {
    "f64": Format(8, words.pointer_f64, _same, _widen, _same),
    "f32": Format(4, words.pointer_f32, _same, _same, _narrow),
    "f16": Format(2, words.pointer_u16, _decode_half, _encode_half, _wide_to_half),
    "bf16": Format(2, words.pointer_u16, scalar.decode_bf16, scalar.encode_bf16, _wide_to_bf16),
    "raw1": _raw(1, words.pointer_u8),
    "raw2": _raw(2, words.pointer_u16),
    "raw4": _raw(4, words.pointer_u32),
    "raw8": _raw(8, words.pointer_i64),
}


class Arithmetic(NamedTuple):
    """The float type that a pair of formats is computed in, and each side's way to and from it."""

    real: Callable[..., Any]
    decode_dst: Callable[..., Any]
    decode_src: Callable[..., Any]
    encode_dst: Callable[..., Any]
    encode_src: Callable[..., Any]


def _widened(decode):
    @device_fn
    def widened(stored):
        return np.float64(decode(stored))

    return widened


def arithmetic(dst: str, src: str) -> Arithmetic:
    """float64 where either side is f64, float32 otherwise."""
    one, other = FORMATS[dst], FORMATS[src]
    if "f64" not in (dst, src):
        return Arithmetic(np.float32, one.decode, other.decode, one.encode, other.encode)
    return Arithmetic(
        np.float64,
        _widened(one.decode),
        _widened(other.decode),
        one.encode_wide,
        other.encode_wide,
    )
