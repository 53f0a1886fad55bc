"""The maths of one element, written in words: no dtype, device or loop here.

Each function runs as plain Python on NumPy scalars and, unchanged, inside a kernel.
"""

from __future__ import annotations

import numpy as np

from fastema.kernels.words import (
    above32,
    add32,
    and32,
    bits32,
    float_of_bits32,
    fma,
    narrow16,
    or32,
    select32,
    shl32,
    shr32,
    sub32,
    widen16,
)


def lerp(avg, x, w):
    """``avg + w * (x - avg)``: two roundings, one in the difference and one in the fma.

    With ``u`` half a unit in the last place of 1, the error is at most
    ``u * |result| + w * u * |x - avg|`` for the ``w`` given (which a caller has rounded to the same
    type, an error of the size of the second term). ``x == avg`` is a fixed point, and ``w == 1``
    gives ``x`` itself whatever ``avg`` holds. An infinite ``avg`` becomes NaN (infinity minus
    infinity), unless ``w == 1``.
    """
    return x if w == 1 else fma(w, x - avg, avg)


def decode_bf16(word):
    """The float32 equal to a bfloat16."""
    return float_of_bits32(shl32(widen16(word), 16))


def encode_bf16(value):
    """The bfloat16 nearest to a float32, ties to even; a NaN stays a (quiet) NaN."""
    bits = bits32(value)
    odd = and32(shr32(bits, 16), 1)
    nearest = shr32(add32(bits, add32(odd, 0x7FFF)), 16)
    nan = above32(and32(bits, 0x7FFFFFFF), 0x7F800000)
    return narrow16(select32(nan, or32(shr32(bits, 16), 0x40), nearest))


def decode_f16(word):
    """The float32 equal to a half-precision number, by integer operations alone.

    The exponent is re-based by a multiplication, which also takes care of subnormals.
    """
    bits = widen16(word)
    magnitude = float_of_bits32(shl32(and32(bits, 0x7FFF), 13)) * np.float32(2.0**112)
    special = above32(and32(bits, 0x7FFF), 0x7BFF)
    plain = select32(special, or32(bits32(magnitude), 0x7F800000), bits32(magnitude))
    return float_of_bits32(or32(plain, shl32(and32(bits, 0x8000), 16)))


def encode_f16(value):
    """The half-precision number nearest to a float32, ties to even, by integer operations alone."""
    bits = bits32(value)
    sign = shr32(and32(bits, 0x80000000), 16)
    magnitude = and32(bits, 0x7FFFFFFF)
    # Normal results: re-base the exponent by 112 and round off 13 bits.
    odd = and32(shr32(magnitude, 13), 1)
    normal = shr32(add32(sub32(magnitude, 0x38000000), add32(odd, 0xFFF)), 13)
    # Subnormal results: adding 0.5 lines the bits up so that the addition rounds them.
    aligned = bits32(float_of_bits32(magnitude) + np.float32(0.5))
    subnormal = sub32(aligned, 0x3F000000)
    rounded = select32(above32(0x38800000, magnitude), subnormal, normal)
    finite = select32(above32(magnitude, 0x477FEFFF), 0x7C00, rounded)
    quiet = or32(0x7E00, and32(shr32(magnitude, 13), 0x3FF))
    return narrow16(or32(sign, select32(above32(magnitude, 0x7F800000), quiet, finite)))


def round_to_odd(value):
    """A float64 as float32, an inexact result forced to an odd last bit.

    Rounding that again to 16 bits equals rounding the float64 once; two roundings to nearest do
    not.
    """
    nearest = np.float32(value)
    back = np.float64(nearest)
    bits = bits32(nearest)
    # The sign bit is apart from the magnitude, so one step of the bits is one step away from zero.
    step = select32(abs(back) > abs(value), 0xFFFFFFFF, 1)
    inexact = back != value and value == value
    even = and32(bits, 1) == 0
    return float_of_bits32(add32(bits, select32(inexact and even, step, 0)))


def park_model(avg):
    """What a bfloat16 model holds while its float32 average is applied (see :func:`park_shadow`).

    The nearest bfloat16; ties go away from zero, because ties to even cannot be undone.
    """
    nan = above32(and32(avg, 0x7FFFFFFF), 0x7F800000)
    high = shr32(avg, 16)
    rounded = add32(high, and32(shr32(avg, 15), 1))
    return narrow16(select32(nan, or32(high, 0x40), rounded))


def park_shadow(avg, weight):
    """The other half of an exact swap of a float32 average with a bfloat16 weight.

    48 bits go in and 48 come out: the model takes the average rounded to 16 bits, the average's own
    storage keeps the raw weight in its high half and the average's low half.
    """
    return or32(shl32(widen16(weight), 16), and32(avg, 0xFFFF))


def unpark_shadow(model, parked):
    """The float32 average again, bit for bit (a signalling NaN comes back quiet)."""
    rounded = widen16(model)
    nan = above32(and32(rounded, 0x7FFF), 0x7F80)
    up = select32(nan, 0, and32(shr32(parked, 15), 1))
    return or32(shl32(sub32(rounded, up), 16), and32(parked, 0xFFFF))


def unpark_model(parked):
    """The raw bfloat16 weight again."""
    return narrow16(shr32(parked, 16))
