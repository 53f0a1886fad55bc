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
    float_of_int,
    fma,
    high32,
    int_of_float,
    low32,
    mul32,
    nan_to_zero,
    narrow16,
    or32,
    select32,
    shl32,
    shr32,
    sub32,
    widen16,
    xor32,
)


def lerp(avg, x, w):
    """``avg + w * (x - avg)``: two roundings, one in the difference and one in the fma.

    With ``u`` half a unit in the last place of 1, the error is at most
    ``u * |result| + w * u * |x - avg|`` for the ``w`` given. ``x == avg`` is a fixed point, and
    ``w == 1`` gives ``x`` itself; otherwise an infinite ``avg`` becomes NaN.
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


def mix32(x):
    """A permutation of 32-bit words in which every bit depends on every other.

    Two rounds of xor-shift and multiply; the constants are C. Wellons' (hash-prospector).
    """
    x = mul32(xor32(x, shr32(x, 16)), 0x7FEB352D)
    x = mul32(xor32(x, shr32(x, 15)), 0x846CA68B)
    return xor32(x, shr32(x, 16))


def index_of(place, first, step, rise, inverse):
    """Index of an element, by its place in a row: ``first + place * step + place // run * rise``.

    ``inverse`` is ``1 / run`` rounded. The quotient is exact for places below ``2**22``: at least
    ``0.5 / run`` from a whole number, it is off by less than ``2**-23`` of itself.
    """
    runs = int_of_float(fma(float_of_int(place), inverse, np.float32(0.5) * inverse))
    return add32(add32(first, mul32(place, step)), mul32(runs, rise))


def random_key(seed, step, tensor, index):
    """Start the random bits of a row; only the high half of the index enters here."""
    key = xor32(mix32(xor32(low32(seed), 0x9E3779B9)), high32(seed))
    key = xor32(mix32(key), low32(step))
    key = xor32(mix32(key), high32(step))
    key = xor32(mix32(key), low32(tensor))
    return mix32(xor32(mix32(key), high32(index)))


def random_word(index, key, second):
    """Sixteen random bits for an element, a function of its index and the keys alone.

    The top half of ``x * (2 * x + 1)``, a permutation whose top bits depend on all others, of ``x``
    mixed by a multiplication and an xor-shift. The second key enters between them: with the first
    alone, two steps would use the same words in another order.
    """
    x = mul32(xor32(index, key), 0x7FEB352D)
    x = xor32(xor32(x, shr32(x, 16)), second)
    return shr32(mul32(x, or32(add32(x, x), 1)), 16)


def encode_bf16_random(value, word):
    """One of the two bfloat16 around a float32, each as likely as the other one is far.

    ``word`` holds 16 random bits, as many as are rounded off: the expected value is the float32
    itself. Infinities stay, NaN stays a NaN, and a finite number stays finite.
    """
    bits = bits32(value)
    magnitude = and32(bits, 0x7FFFFFFF)
    carried = add32(magnitude, word)
    rounded = select32(above32(carried, 0x7F7FFFFF), 0x7F7FFFFF, carried)
    quiet = select32(above32(magnitude, 0x7F800000), or32(magnitude, 0x400000), magnitude)
    kept = select32(above32(magnitude, 0x7F7FFFFF), quiet, rounded)
    return narrow16(shr32(or32(and32(bits, 0x80000000), kept), 16))


def encode_bf16_of_bf16(value):
    """:func:`encode_bf16` for what arithmetic on bfloat16 numbers gives on a CPU.

    The low half of a NaN is zero there, so that rounding cannot carry out of it.
    """
    bits = bits32(value)
    return narrow16(shr32(add32(bits, add32(and32(shr32(bits, 16), 1), 0x7FFF)), 16))


def encode_bf16_of_bf16_random(value, word):
    """:func:`encode_bf16_random` for a weighted mean of two bfloat16, which cannot overflow."""
    return narrow16(shr32(add32(bits32(value), word), 16))


def encode_bf16_of_bf16_random_gpu(value, word):
    """The same for what arithmetic gives on a GPU, where all bits of a NaN are ones."""
    rounded = shr32(add32(bits32(value), word), 16)
    return narrow16(select32(value != value, 0x7FFF, rounded))


def encode_f16_random(value, word):
    """One of the two half-precision numbers around a float32, each as likely as the other is far.

    Of the 16 random bits it takes 13, as many as are rounded off. Below the normal range the number
    is first rounded to 2**-37, which shifts the expected value by 2**-14 of the last place at most.
    Beyond the largest number it rounds to nearest.
    """
    bits = bits32(value)
    sign = shr32(and32(bits, 0x80000000), 16)
    magnitude = and32(bits, 0x7FFFFFFF)
    noise = shr32(word, 3)
    normal = shr32(add32(sub32(magnitude, 0x38000000), noise), 13)
    # Adding 2**-14 lines the bits of a subnormal result up.
    aligned = bits32(float_of_bits32(magnitude) + np.float32(2.0**-14))
    subnormal = shr32(add32(sub32(aligned, 0x38800000), noise), 13)
    rounded = select32(above32(0x38800000, magnitude), subnormal, normal)
    beyond = select32(above32(magnitude, 0x477FEFFF), 0x7C00, 0x7BFF)
    finite = select32(above32(magnitude, 0x477FE000), beyond, rounded)
    quiet = or32(0x7E00, and32(shr32(magnitude, 13), 0x3FF))
    return narrow16(or32(sign, select32(above32(magnitude, 0x7F800000), quiet, finite)))


def round_to_odd(value):
    """A float64 as float32, an inexact result forced to an odd last bit: safe to round again."""
    nearest = np.float32(value)
    back = np.float64(nearest)
    bits = bits32(nearest)
    # The sign bit is apart from the magnitude, so one step of the bits is one step away from zero.
    step = select32(abs(back) > abs(value), 0xFFFFFFFF, 1)
    inexact = back != value and value == value
    even = and32(bits, 1) == 0
    return float_of_bits32(add32(bits, select32(inexact and even, step, 0)))


def _rounded_away(bits):
    """The high half of a float32 rounded to nearest, ties away from zero: what can be undone."""
    return add32(shr32(bits, 16), and32(shr32(bits, 15), 1))


def park_model(avg):
    """The bits of a bfloat16 model while its float32 average is applied (see :func:`park_shadow`).

    The nearest bfloat16; ties go away from zero, because ties to even cannot be undone. A NaN keeps
    its high half; where that is an infinity's, it becomes a quiet one.
    """
    high = shr32(avg, 16)
    nan = above32(and32(avg, 0x7FFFFFFF), 0x7F800000)
    kept = select32(and32(high, 0x7F) == 0, or32(high, 0x40), high)
    return narrow16(select32(nan, kept, _rounded_away(avg)))


def park_shadow(avg, weight):
    """The other half of an exact swap of a float32 average with a bfloat16 weight.

    48 bits go in and 48 come out: the model takes the average rounded to 16 bits, the average's own
    storage keeps the raw weight in its high half and the average's low half.
    """
    return or32(shl32(widen16(weight), 16), and32(avg, 0xFFFF))


def unpark_shadow(model, parked):
    """The float32 average again, bit for bit, but for NaNs that :func:`park_model` made quiet."""
    rounded = widen16(model)
    nan = above32(and32(rounded, 0x7FFF), 0x7F80)
    up = select32(nan, 0, and32(shr32(parked, 15), 1))
    return or32(shl32(sub32(rounded, up), 16), and32(parked, 0xFFFF))


def join_halves(high, low):
    """The float32 that :func:`split_high` and :func:`split_low` took apart."""
    return float_of_bits32(unpark_shadow(high, widen16(low)))


def split_high(value):
    """The bfloat16 nearest to a float32, ties away from zero; a NaN becomes quiet."""
    bits = bits32(value)
    nan = above32(and32(bits, 0x7FFFFFFF), 0x7F800000)
    return narrow16(select32(nan, or32(shr32(bits, 16), 0x40), _rounded_away(bits)))


def split_low(value):
    """The residual that completes it to the float32 (a signalling NaN comes back quiet)."""
    return narrow16(bits32(value))


def stowed_high(bits):
    """The high half of 32 bits that an average's two halves keep; compare :func:`split_high`.

    No pattern is lost, for which there are too many NaNs: of the signalling ones whose high half is
    an infinity's, those that would be rounded up have the high half of a zero here.
    """
    high, rounded = shr32(bits, 16), _rounded_away(bits)
    nan = above32(and32(bits, 0x7FFFFFFF), 0x7F80FFFF)
    beyond = and32(rounded, 0x7FFF) == 0x7F81
    return narrow16(select32(nan, high, select32(beyond, and32(high, 0x8000), rounded)))


def unstowed(high, low):
    """The 32 bits again; also those of what :func:`split_high` took apart."""
    rounded, rest = widen16(high), widen16(low)
    up = shr32(rest, 15)
    nan = above32(and32(rounded, 0x7FFF), 0x7F80)
    beyond = above32(up, and32(rounded, 0x7FFF))
    whole = select32(nan, rounded, select32(beyond, or32(rounded, 0x7F80), sub32(rounded, up)))
    return or32(shl32(whole, 16), rest)


def unpark_model(parked):
    """The raw bfloat16 weight again."""
    return narrow16(shr32(parked, 16))


def two_sum(x, y):
    """``x + y`` rounded, and exactly what the rounding left out (Knuth)."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def mean_step(avg, rest, x, old, old_rest, n, inverse):
    """``avg + rest + (x - old - old_rest) / n`` as a sum of two floats.

    ``inverse`` is ``1 / n`` rounded. With ``u`` half a unit in the last place of 1, the result is
    off by a few ``u * u`` of the largest number involved. An infinity comes through as one.
    """
    difference, left = two_sum(x, -old)
    quotient = difference * inverse
    small = (fma(-quotient, n, difference) + (left - old_rest)) * inverse
    total, error = two_sum(avg, quotient)
    return two_sum(total, nan_to_zero(rest + (error + small)))
