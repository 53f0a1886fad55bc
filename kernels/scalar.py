"""The math of one element, written in words, without dtypes, devices or loops.

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
    float_of_signed,
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
    """Return ``avg + w * (x - avg)``, rounded twice: in the difference and in the fma.

    With ``u`` half a unit in the last place of 1, the error is at most
    ``u * |result| + w * u * |x - avg|`` for the given ``w``. ``x == avg`` is a fixed point, and
    ``w == 1`` returns ``x`` itself; otherwise an infinite ``avg`` becomes NaN.
    """
    return x if w == 1 else fma(w, x - avg, avg)


_DITHER = np.float32(2.0**-56 * (1 - 2.0**-20))
"""The factor from a signed 32-bit number to just below a quarter of the last place of 1."""


def power_at(value, least):
    """Return the power of two at or below a float32's magnitude, at least that with bits ``least``.

    Infinite for an infinity and NaN.
    """
    exponent = and32(bits32(value), 0x7F800000)
    return float_of_bits32(select32(above32(least, exponent), least, exponent))


def finite_power_at(value, least):
    """Return :func:`power_at`, but the largest power of two for an infinity and NaN."""
    power = power_at(value, least)
    return power if power < np.inf else np.float32(2.0**127)


def with_dither(w):
    """Return a weight, and what makes the numbers of :func:`fma_dithered` of its ``noise``."""
    return w, _DITHER / max(abs(w), np.float32(2.0**-24))


def fma_dithered(weight, half_x, avg, power, noise):
    """Return a float32 next to ``avg + w * x`` whose expected value is ``avg + w * x``.

    Float32 would keep only a few bits of the small steps of a 16-bit average, or none. So the
    step is rounded, not the sum: to a multiple of the last place ``u`` of ``avg``, after adding a
    random number between ``-u / 2`` and ``u / 2``. The sum of ``avg`` and this step is exact unless
    it leads to a larger power of two. A step of 0 stays 0. A step larger than ``p / 2`` loses
    nothing that matters in the sum, which is rounded to nearest instead: it may cancel ``avg``.

    The expected error is below ``2**-21`` of the step plus ``2**-20 * u``, for ``|w| >= 2**-24``;
    smaller weights add too small a random number.

    Parameters
    ----------
    weight : (float32, float32)
        :func:`with_dither` of the weight ``w``; it divides, so it is computed once for many ``x``.
    half_x, avg : float32
        ``x / 2`` and the average. All is computed in halves, so that nothing overflows if the
        result does not.
    power : float32
        The power of two ``p`` at ``avg``, not below ``2**-125``; then ``u = 2**-23 * p``.
    noise : float32
        A random number, uniform on ``[-2**31, 2**31)``.
    """
    w, dither = weight
    base = np.float32(0.75) * power
    step = fma(w, fma(noise * dither, power, half_x), base) - base
    plain = (abs(step) > np.float32(0.25) * power) | (half_x == 0)  # subnormal numbers may round 0
    return fma(w + w if plain else np.float32(2), half_x if plain else step, avg)


def lerp_dithered(avg, x, weight, noise, least):
    """Return ``avg + w * (x - avg)`` as :func:`fma_dithered` rounds it, and ``x`` if ``w == 1``."""
    half = fma(avg, np.float32(-0.5), np.float32(0.5) * x)
    mean = fma_dithered(weight, half, avg, power_at(avg, least), noise)
    return x if weight[0] == 1 else mean  # a selection: GPUs would not move a branch from the loop


def add_dithered(avg, x, weight, noise, least):
    """Return ``avg + w * x`` as :func:`fma_dithered` rounds it; an infinite ``avg`` stays."""
    half = np.float32(0.5) * x
    return fma_dithered(weight, half, avg, finite_power_at(avg, least), noise)


def narrow_dithered(value, noise, least):
    """Return a float32 next to a float64 whose expected value is the float64.

    Like :func:`fma_dithered`, it rounds to a multiple of the last place. A finite number stays
    finite, and signs stay.
    """
    sign = and32(bits32(np.float32(value)), 0x80000000)
    power = np.float64(finite_power_at(np.float32(value), least))
    dithered = fma(np.float64(noise), power * (2.0**-55 * (1 - 2.0**-20)), value)
    large = power * (1.5 * 2.0**29)  # a multiple of its last place is one of float32's at `value`
    rounded = and32(bits32(np.float32((dithered + large) - large)), 0x7FFFFFFF)
    beyond = rounded == 0x7F800000 and abs(value) < np.inf
    return float_of_bits32(or32(sub32(rounded, select32(beyond, 1, 0)), sign))


def decode_bf16(word):
    """Return the float32 equal to a bfloat16."""
    return float_of_bits32(shl32(widen16(word), 16))


def encode_bf16(value):
    """Return the bfloat16 nearest to a float32, ties to even; a NaN stays a (quiet) NaN."""
    bits = bits32(value)
    odd = and32(shr32(bits, 16), 1)
    nearest = shr32(add32(bits, add32(odd, 0x7FFF)), 16)
    nan = above32(and32(bits, 0x7FFFFFFF), 0x7F800000)
    return narrow16(select32(nan, or32(shr32(bits, 16), 0x40), nearest))


def decode_f16(word):
    """Return the float32 equal to a half-precision number, by integer operations alone.

    A multiplication re-bases the exponent, which also handles subnormals.
    """
    bits = widen16(word)
    magnitude = float_of_bits32(shl32(and32(bits, 0x7FFF), 13)) * np.float32(2.0**112)
    special = above32(and32(bits, 0x7FFF), 0x7BFF)
    plain = select32(special, or32(bits32(magnitude), 0x7F800000), bits32(magnitude))
    return float_of_bits32(or32(plain, shl32(and32(bits, 0x8000), 16)))


def encode_f16(value):
    """Return the half-precision number nearest to a float32, ties to even, using integers only."""
    bits = bits32(value)
    sign = shr32(and32(bits, 0x80000000), 16)
    magnitude = and32(bits, 0x7FFFFFFF)
    # Normal results: re-base the exponent by 112 and round off 13 bits.
    odd = and32(shr32(magnitude, 13), 1)
    normal = shr32(add32(sub32(magnitude, 0x38000000), add32(odd, 0xFFF)), 13)
    # Subnormal results: adding 0.5 aligns the bits so that the addition rounds them.
    aligned = bits32(float_of_bits32(magnitude) + np.float32(0.5))
    subnormal = sub32(aligned, 0x3F000000)
    rounded = select32(above32(0x38800000, magnitude), subnormal, normal)
    finite = select32(above32(magnitude, 0x477FEFFF), 0x7C00, rounded)
    quiet = or32(0x7E00, and32(shr32(magnitude, 13), 0x3FF))
    return narrow16(or32(sign, select32(above32(magnitude, 0x7F800000), quiet, finite)))


def mix32(x):
    """Return a permutation of a 32-bit word in which every bit depends on every other.

    Two rounds of xor-shift and multiply; the constants are by C. Wellons (hash-prospector).
    """
    x = mul32(xor32(x, shr32(x, 16)), 0x7FEB352D)
    x = mul32(xor32(x, shr32(x, 15)), 0x846CA68B)
    return xor32(x, shr32(x, 16))


def index_of(place, first, step, rise, inverse):
    """Return an element's index in its tensor: ``first + place * step + place // run * rise``.

    ``place`` is the position in the row, ``inverse`` is ``1 / run`` rounded. The quotient is exact
    for places below ``2**22``: it is at least ``0.5 / run`` from a whole number, and its relative
    error is less than ``2**-23``.
    """
    runs = int_of_float(fma(float_of_signed(place), inverse, np.float32(0.5) * inverse))
    return add32(add32(first, mul32(place, step)), mul32(runs, rise))


def random_key(seed, step, tensor, index):
    """Return the key of a row's random bits; it uses only the high half of the index."""
    key = xor32(mix32(xor32(low32(seed), 0x9E3779B9)), high32(seed))
    key = xor32(mix32(key), low32(step))
    key = xor32(mix32(key), high32(step))
    key = xor32(mix32(key), low32(tensor))
    return mix32(xor32(mix32(key), high32(index)))


WORD_STRIDE = np.uint32(0x7FEB352D)
"""From the counter of one element to that of the next: an odd number with well mixed bits."""


def word_counter(index, key):
    """Return an element's counter for :func:`random_word`; neighbors are a stride apart."""
    return mul32(add32(index, key), WORD_STRIDE)


def random_word(counter, second):
    """Return 32 random bits for an element, which depend only on its counter and its row's keys.

    An xor-shift mixes the counter into ``x``; the result is ``x * (2 * x + 1)``, a permutation
    whose top bits depend on all others. The second key enters after the xor-shift: with the first
    alone, two steps would use the same words in another order.
    """
    x = xor32(xor32(counter, shr32(counter, 16)), second)
    return mul32(x, or32(add32(x, x), 1))


def encode_bf16_random(value, word):
    """Round a float32 stochastically to one of the two bfloat16 around it.

    The nearer one is proportionally more likely. Uses the 16 highest bits of ``word``, as many as
    are rounded off, so the expected value is the float32 itself. Infinities stay, NaN stays a NaN,
    and a finite number stays finite.
    """
    bits = bits32(value)
    magnitude = and32(bits, 0x7FFFFFFF)
    carried = add32(magnitude, shr32(word, 16))
    rounded = select32(above32(carried, 0x7F7FFFFF), 0x7F7FFFFF, carried)
    quiet = select32(above32(magnitude, 0x7F800000), or32(magnitude, 0x400000), magnitude)
    kept = select32(above32(magnitude, 0x7F7FFFFF), quiet, rounded)
    return narrow16(shr32(or32(and32(bits, 0x80000000), kept), 16))


def encode_bf16_of_bf16(value):
    """Round as :func:`encode_bf16` does, if the value is computed from bfloat16 numbers on a CPU.

    The low half of a NaN is then zero, so that rounding cannot carry out of it.
    """
    bits = bits32(value)
    return narrow16(shr32(add32(bits, add32(and32(shr32(bits, 16), 1), 0x7FFF)), 16))


def encode_bf16_of_bf16_random(value, word):
    """Round stochastically a weighted mean of two bfloat16 numbers, which cannot overflow."""
    return narrow16(shr32(add32(bits32(value), shr32(word, 16)), 16))


def encode_bf16_of_bf16_random_gpu(value, word):
    """Round stochastically as on the CPU, but for a GPU, where all bits of a NaN are ones."""
    rounded = shr32(add32(bits32(value), shr32(word, 16)), 16)
    return narrow16(select32(value != value, 0x7FFF, rounded))


def encode_f16_random(value, word):
    """Round a float32 stochastically to one of the two half-precision numbers around it.

    Uses the 13 highest bits of ``word``, as many as are rounded off. Below the normal range the
    number is first rounded to a multiple of 2**-37, which dithered numbers are. Above the largest
    number it rounds to nearest.
    """
    bits = bits32(value)
    sign = shr32(and32(bits, 0x80000000), 16)
    magnitude = and32(bits, 0x7FFFFFFF)
    noise = shr32(word, 19)
    normal = shr32(add32(sub32(magnitude, 0x38000000), noise), 13)
    # Adding 2**-14 aligns the bits of a subnormal result.
    aligned = bits32(float_of_bits32(magnitude) + np.float32(2.0**-14))
    subnormal = shr32(add32(sub32(aligned, 0x38800000), noise), 13)
    rounded = select32(above32(0x38800000, magnitude), subnormal, normal)
    beyond = select32(above32(magnitude, 0x477FEFFF), 0x7C00, 0x7BFF)
    finite = select32(above32(magnitude, 0x477FE000), beyond, rounded)
    quiet = or32(0x7E00, and32(shr32(magnitude, 13), 0x3FF))
    return narrow16(or32(sign, select32(above32(magnitude, 0x7F800000), quiet, finite)))


def round_to_odd(value):
    """Return a float64 as float32, with an odd last bit if inexact: safe to round again."""
    nearest = np.float32(value)
    back = np.float64(nearest)
    bits = bits32(nearest)
    # The sign bit is separate, so adding 1 to the bits moves one step away from zero.
    step = select32(abs(back) > abs(value), 0xFFFFFFFF, 1)
    inexact = back != value and value == value
    even = and32(bits, 1) == 0
    return float_of_bits32(add32(bits, select32(inexact and even, step, 0)))


def _round_away(bits):
    """Return the high half of a float32, rounded to nearest, ties away from zero: reversible."""
    return add32(shr32(bits, 16), and32(shr32(bits, 15), 1))


def park_model(avg):
    """Return a bfloat16 model's bits while its float32 average is applied (:func:`park_shadow`).

    They are the nearest bfloat16, ties away from zero, because ties to even cannot be undone. Every
    other way to put a float32 average into bfloat16 weights rounds like this too. A NaN keeps its
    high half; if that is the high half of an infinity, the NaN becomes quiet.
    """
    high = shr32(avg, 16)
    nan = above32(and32(avg, 0x7FFFFFFF), 0x7F800000)
    kept = select32(and32(high, 0x7F) == 0, or32(high, 0x40), high)
    return narrow16(select32(nan, kept, _round_away(avg)))


def park_shadow(avg, weight):
    """Return the shadow's half of an exact swap of a float32 average with a bfloat16 weight.

    48 bits go in and 48 come out: the model takes the average rounded to 16 bits. The average's
    storage takes the raw weight in its high half and keeps the average's low half.
    """
    return or32(shl32(widen16(weight), 16), and32(avg, 0xFFFF))


def unpark_shadow(model, parked):
    """Return the float32 average, bit for bit except NaNs that :func:`park_model` made quiet."""
    rounded = widen16(model)
    nan = above32(and32(rounded, 0x7FFF), 0x7F80)
    up = select32(nan, 0, and32(shr32(parked, 15), 1))
    return or32(shl32(sub32(rounded, up), 16), and32(parked, 0xFFFF))


def join_halves(high, low):
    """Return the float32 that :func:`split_high` and :func:`split_low` have split."""
    return float_of_bits32(unpark_shadow(high, widen16(low)))


def split_high(value):
    """Return the bfloat16 nearest to a float32, ties away from zero; a NaN becomes quiet."""
    bits = bits32(value)
    nan = above32(and32(bits, 0x7FFFFFFF), 0x7F800000)
    return narrow16(select32(nan, or32(shr32(bits, 16), 0x40), _round_away(bits)))


def split_low(value):
    """Return the residual of :func:`split_high` (joined, a signaling NaN comes back quiet)."""
    return narrow16(bits32(value))


def stow_high(bits):
    """Return the high half of 32 raw bits that an average's two halves hold during a swap.

    No bit pattern is lost, unlike in :func:`split_high`. Signaling NaNs that have the high half of
    an infinity and would be rounded up are stored with the high half of a zero instead.
    """
    high, rounded = shr32(bits, 16), _round_away(bits)
    nan = above32(and32(bits, 0x7FFFFFFF), 0x7F80FFFF)
    beyond = and32(rounded, 0x7FFF) == 0x7F81
    return narrow16(select32(nan, high, select32(beyond, and32(high, 0x8000), rounded)))


def unstow(high, low):
    """Return the 32 bits of both halves, also those that :func:`split_high` has split."""
    rounded, rest = widen16(high), widen16(low)
    up = shr32(rest, 15)
    nan = above32(and32(rounded, 0x7FFF), 0x7F80)
    beyond = above32(up, and32(rounded, 0x7FFF))
    whole = select32(nan, rounded, select32(beyond, or32(rounded, 0x7F80), sub32(rounded, up)))
    return or32(shl32(whole, 16), rest)


def unpark_model(parked):
    """Return the raw bfloat16 weight from the average's storage."""
    return narrow16(shr32(parked, 16))


def two_sum(x, y):
    """Return ``x + y`` rounded, and the exact rounding error (Knuth)."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def mean_step(avg, rest, x, old, old_rest, n, inverse):
    """Return ``avg + rest + (x - old - old_rest) / n`` as a sum of two floats.

    ``inverse`` is ``1 / n`` rounded. With ``u`` half a unit in the last place of 1, the error is a
    few ``u * u`` of the largest number involved. An infinity stays an infinity.
    """
    difference, left = two_sum(x, -old)
    quotient = difference * inverse
    small = (fma(-quotient, n, difference) + (left - old_rest)) * inverse
    total, error = two_sum(avg, quotient)
    return two_sum(total, nan_to_zero(rest + (error + small)))
