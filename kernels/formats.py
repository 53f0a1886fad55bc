"""Element formats: their pointers, and their conversions to and from arithmetic types.

A new dtype is one row here (and one in ``fastema.layout.dtypes``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from numba.core.registry import cpu_target

from fastema.kernels import scalar, words
from fastema.kernels.jit import device_fn


class Dither(NamedTuple):
    """How to round to float32 before rounding to a stochastic format: see ``fma_dithered``."""

    used: int  # high bits of the random word that the rounding to the format uses
    least: int  # bits of the smallest power of two


class Format(NamedTuple):
    """One stored format.

    ``decode(stored)`` returns a float32 (a float64 for f64). ``encode(value, word)`` takes a
    float32 and ``encode_wide(value, word)`` a float64. Both round once: to nearest even, or, in
    formats whose name ends in ``~``, stochastically by the 32 random bits of ``word``. Raw formats
    are moved, never computed with. For a float32 split in two halves, ``residual`` is the format of
    the second half, and ``complete`` holds ``join(stored, residual)`` and ``rest(value)``, which
    computes the second half. ``dither`` belongs to stochastic formats.
    """

    itemsize: int
    pointer: Callable[..., Any]
    decode: Callable[..., Any]
    encode: Callable[..., Any]
    encode_wide: Callable[..., Any]
    residual: str | None = None
    complete: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    dither: Dither | None = None


_HALF_TO_FLOAT = """
define float @convert(half %x) {
  %y = fpext half %x to float
  ret float %y
}"""


def _converts_half() -> bool:
    # Query the compiler: Numba may compile for another processor than this one (NUMBA_CPU_NAME).
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvmlite.binding.Target.from_triple(triple).create_target_machine(name, features)
    listing = machine.emit_assembly(llvmlite.binding.parse_assembly(_HALF_TO_FLOAT))
    return not any(library in listing for library in ("__extendhfsf2", "__gnu_h2f_ieee"))


CONVERTS_HALF = _converts_half()
"""Whether the target processor has instructions that convert half precision.

Without them LLVM calls a library function, and if that is missing the process ends.
"""

_decode_half, _encode_half = (
    (words.half_to_float, words.float_to_half)
    if CONVERTS_HALF
    else (scalar.decode_f16, scalar.encode_f16)
)


@device_fn
def _same(value):
    return value


@device_fn
def _keep(value, word):
    return value


@device_fn
def _narrow(value, word):
    return np.float32(value)


@device_fn
def _widen(value, word):
    return np.float64(value)


def _nearest(encode):
    """Return ``encode`` as an encoding that ignores the random bits."""

    @device_fn
    def nearest(value, word):
        return encode(value)

    return nearest


def _from_wide(encode):
    """Return the encoding of a float64 that rounds once, although it passes through float32."""

    @device_fn
    def from_wide(value, word):
        return encode(scalar.round_to_odd(value), word)

    return from_wide


def _sixteen(decode, encode):
    return Format(2, words.pointer_u16, decode, encode, _from_wide(encode))


@device_fn
def _noise_of(word, used):
    """Return the bits of a random word below the ``used`` highest as a signed number."""
    return words.float_of_signed(words.shl32(word, used))


def _stochastic(decode, encode, dither):
    used, least = dither

    @device_fn
    def encode_wide(value, word):
        return encode(scalar.narrow_dithered(value, _noise_of(word, used), least), word)

    return Format(2, words.pointer_u16, decode, encode, encode_wide, dither=dither)


def _raw(itemsize, pointer):
    return Format(itemsize, pointer, _same, _keep, _keep)


FORMATS = {
    "f64": Format(8, words.pointer_f64, _same, _widen, _keep),
    "f32": Format(4, words.pointer_f32, _same, _keep, _narrow),
    "f16": _sixteen(_decode_half, _nearest(_encode_half)),
    "f16~": _stochastic(_decode_half, scalar.encode_f16_random, Dither(13, 113 << 23)),
    "bf16": _sixteen(scalar.decode_bf16, _nearest(scalar.encode_bf16)),
    "bf16~": _stochastic(scalar.decode_bf16, scalar.encode_bf16_random, Dither(16, 2 << 23)),
    "bf16+16": _sixteen(scalar.decode_bf16, _nearest(scalar.split_high))._replace(
        residual="raw2", complete=(scalar.join_halves, scalar.split_low)
    ),
    "raw1": _raw(1, words.pointer_u8),
    "raw2": _raw(2, words.pointer_u16),
    "raw4": _raw(4, words.pointer_u32),
    "raw8": _raw(8, words.pointer_i64),
}

_GPU_BF16 = _nearest(words.float_to_bf16)

_CHEAPER = {
    "cpu": {},
    "cuda": {"bf16": FORMATS["bf16"]._replace(encode=_GPU_BF16, encode_wide=_from_wide(_GPU_BF16))},
    "cuda, bf16 by integers": {},
}
"""By device, formats that use its own conversion instructions."""

_FROM_BF16 = {
    "cpu": {
        "bf16": _nearest(scalar.encode_bf16_of_bf16),
        "bf16~": scalar.encode_bf16_of_bf16_random,
    },
    "cuda": {"bf16~": scalar.encode_bf16_of_bf16_random_gpu},
    "cuda, bf16 by integers": {"bf16~": scalar.encode_bf16_of_bf16_random_gpu},
}
"""By device, cheaper encodings for averages of bfloat16 weights only."""


class Access(NamedTuple):
    """The float type in which a pair of formats is computed, and the conversions of each side.

    ``read(d, residual)`` and ``write(value, word) -> (d, residual)`` convert the written side with
    its residual, ``read_src(s)`` and ``write_src(value)`` the other side. ``lerp(avg, x, w, word)``
    and ``add(avg, x, w, word)`` are ``avg + w * (x - avg)`` and ``avg + w * x``, rounded to
    nearest, or dithered if ``write`` rounds stochastically. Their ``w`` is ``number(w)`` of a
    float64.
    """

    real: Callable[..., Any]
    read: Callable[..., Any]
    write: Callable[..., Any]
    read_src: Callable[..., Any]
    write_src: Callable[..., Any]
    number: Callable[..., Any]
    lerp: Callable[..., Any]
    add: Callable[..., Any]


def access(dst: str, src: str, device: str, *others: str) -> Access:
    """Return the conversions for a pair of formats on a device.

    They compute in float64 if either side, or any of ``others``, is f64; otherwise in float32.
    """
    one, other = (_CHEAPER[device].get(name, FORMATS[name]) for name in (dst, src))
    wide = "f64" in (dst, src, *others)
    real = np.float64 if wide else np.float32
    as_real = _same if dst.startswith("raw") else real
    encode = one.encode_wide if wide else one.encode
    if {src, *others} == {"bf16"}:
        encode = _FROM_BF16[device].get(dst, encode)
    encode_src = other.encode_wide if wide else other.encode
    decode_src = other.decode
    read, write = (_single if one.complete is None else _double)(one, as_real, encode)

    @device_fn
    def read_src(s):
        return as_real(decode_src(s))

    @device_fn
    def write_src(value):
        return encode_src(value, np.uint32(0))

    sums = _rounded_sums(real) if one.dither is None or wide else _dithered_sums(one.dither)
    return Access(real, read, write, read_src, write_src, *sums)


def _rounded_sums(real):
    """Return ``number``, ``lerp`` and ``add``, rounded to nearest."""

    @device_fn
    def lerp(avg, x, w, word):
        return scalar.lerp(avg, x, w)

    @device_fn
    def add(avg, x, w, word):
        return scalar.fma(w, x, avg)

    return real, lerp, add


def _dithered_sums(dither):
    """Return ``number``, and ``lerp`` and ``add`` whose expected values are exact."""
    used, least = dither

    @device_fn
    def number(w):
        return scalar.with_dither(np.float32(w))

    @device_fn
    def lerp(avg, x, w, word):
        return scalar.lerp_dithered(avg, x, w, _noise_of(word, used), least)

    @device_fn
    def add(avg, x, w, word):
        return scalar.add_dithered(avg, x, w, _noise_of(word, used), least)

    return number, lerp, add


def _single(form, as_real, encode):
    """Return the ``read`` and ``write`` of a format with one stored number."""
    decode = form.decode

    @device_fn
    def read(d, residual):
        return as_real(decode(d))

    @device_fn
    def write(value, word):
        return encode(value, word), np.uint8(0)

    return read, write


def _double(form, as_real, encode):
    """Return the ``read`` and ``write`` of a float32 split in two halves."""
    join, rest = form.complete

    @device_fn
    def read(d, residual):
        return as_real(join(d, residual))

    @device_fn
    def write(value, word):
        narrow = np.float32(value)
        return encode(narrow, word), rest(narrow)

    return read, write
