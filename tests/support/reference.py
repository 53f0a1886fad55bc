"""The specification of every kernel's results, in plain NumPy.

It shares no code with the kernels and rounds by other means: it scales a number until the last
digit of the format is the unit, applies ``rint`` and scales back, all exactly in float64.

Arrays are in storage form: ``f64``, ``f32`` and ``f16`` are NumPy floats, ``bf16`` is ``uint16``
bits, and ``c64`` and ``c128`` are NumPy complex numbers, which count as pairs of reals. All NaNs
are equivalent.
"""

import math
import zlib
from fractions import Fraction
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Reals = NDArray[np.float64]
Words = NDArray[np.uint32]


class Float(NamedTuple):
    """A binary floating-point format: significant bits, range of exponents, NumPy storage."""

    digits: int
    lowest: int
    highest: int
    storage: str

    @property
    def largest(self) -> float:
        """Largest finite number."""
        return math.ldexp(2.0 - math.ldexp(1.0, 1 - self.digits), self.highest)

    @property
    def smallest(self) -> float:
        """Smallest positive number, which is subnormal."""
        return math.ldexp(1.0, self.lowest - self.digits + 1)


FLOATS: Final = {
    "f64": Float(53, -1022, 1023, "float64"),
    "f32": Float(24, -126, 127, "float32"),
    "f16": Float(11, -14, 15, "float16"),
    "bf16": Float(8, -126, 127, "uint16"),
}
"""Formats by dtype code."""

_PARTS: Final = {"c64": "f32", "c128": "f64"}


def real_of(code: str) -> str:
    """Return the code of an element's reals: ``f32`` for ``c64``, a real code unchanged."""
    return _PARTS.get(code, code)


def decode(stored: Array, code: str) -> Reals:
    """Convert stored reals to float64, exactly."""
    if code == "bf16":
        stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return stored.astype(np.float64)


def _last_place(values: Reals, form: Float) -> NDArray[np.intc]:
    """Return the exponent of the format's last digit at each value."""
    with np.errstate(invalid="ignore"):  # NaN
        _, exponent = np.frexp(values)
    return (np.maximum(exponent, form.lowest + 1) - form.digits).astype(np.intc)


def _round_to_nearest(values: Reals, form: Float) -> Reals:
    place = _last_place(values, form)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ldexp(np.rint(np.ldexp(values, -place)), place)


def _overflow_to_infinity(values: Reals, form: Float) -> Reals:
    return np.where(np.abs(values) > form.largest, np.copysign(np.inf, values), values)


def encode(values: Reals, code: str) -> Array:
    """Round float64 numbers to a format, ties to even, and return them in storage form."""
    form = FLOATS[code]
    if code == "f64":
        return values
    rounded = _overflow_to_infinity(_round_to_nearest(values, form), form)
    if code == "bf16":
        return (rounded.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return rounded.astype(form.storage)


def cast(x: Array, src: str, dst: str) -> Array:
    """Convert ``x`` to a format, rounded once, ties to even; copy it if that is its own."""
    if src == dst:
        return x.copy()
    if src in _PARTS:
        parts = encode(decode(x.view(real_of_storage(src)), _PARTS[src]), _PARTS[dst])
        return parts.view(np.complex64 if dst == "c64" else np.complex128)
    return encode(decode(x, src), dst)


def real_of_storage(code: str) -> str:
    """Return NumPy's dtype name for the reals of a stored element."""
    return FLOATS[real_of(code)].storage


def encode_randomly(values: Reals, words: Array, code: str) -> Array:
    """Round float32 numbers to one of their two 16-bit neighbors; random words decide which.

    Let ``f`` be the fraction of the way from the neighbor nearer zero to the other one, in units
    of the dropped bits (``2**-16`` for bf16, ``2**-13`` for f16). The result is the neighbor
    farther from zero where ``f`` plus the word's highest bits reaches 1. Below the normal range of
    f16, values are first rounded to multiples of ``2**-37``. A finite value never becomes infinite
    in bf16; beyond its largest number, f16 rounds to nearest.
    """
    form = FLOATS[code]
    bits = FLOATS["f32"].digits - form.digits
    sizes = np.abs(values)
    place = _last_place(sizes, form)
    with np.errstate(over="ignore", invalid="ignore"):
        units = np.rint(np.ldexp(sizes, bits - place))  # integers, except subnormal f16 results
        units += np.asarray(words, np.uint32) >> np.uint32(32 - bits)
        rounded = np.ldexp(np.floor(np.ldexp(units, -bits)), place)
    if code == "bf16":
        rounded = np.where(np.isfinite(sizes), np.minimum(rounded, form.largest), sizes)
    else:
        rounded = np.where(
            sizes > form.largest,
            _overflow_to_infinity(_round_to_nearest(sizes, form), form),
            rounded,
        )
    return encode(np.copysign(rounded, values), code)


_DITHER: Final = 2.0**-55 * (1 - 2.0**-20)


def _noise_and_power(values: Reals, words: Array, code: str) -> tuple[Reals, Reals]:
    """Return the word's low bits as a signed 32-bit number, and the power of two at the value."""
    used = FLOATS["f32"].digits - FLOATS[code].digits
    noise = (np.asarray(words, np.uint32) << np.uint32(used)).view(np.int32).astype(np.float64)
    with np.errstate(invalid="ignore"):  # NaN
        _, exponent = np.frexp(values.astype(np.float32))
    exponent = np.where(np.isfinite(values.astype(np.float32)), exponent, 128)
    lowest = {"bf16": -125, "f16": -14}[code]
    power = np.ldexp(1.0, np.maximum(np.where(values == 0, lowest, exponent - 1), lowest))
    return noise, power


def _float32(values: Any) -> Reals:
    return np.asarray(values, np.float32).astype(np.float64)


def _lerp_dithered(old: Reals, new: Reals, w: float, words: Array, code: str) -> Reals:
    """Return the weighted mean in float32, where the step is rounded to the last place of ``old``.

    A random number of at most half that place is added to the step first, so that its expected
    value stays. All is computed in halves. Steps of 0, and steps above half the power of two
    at ``old``, are added without.
    """
    noise, power = _noise_and_power(old, words, code)
    scale = np.float32(_DITHER / 2) / np.float32(max(abs(w), 2.0**-24))
    difference = _fma32(-0.5, old, _float32(new / 2))
    dithered = _fma32(_float32(noise.astype(np.float32) * scale), power, difference)
    half = 0.75 * power
    step = _float32(_fma32(w, dithered, half) - half)
    plain = (np.abs(step) > 0.25 * power) | (difference == 0)
    mean = np.where(plain, _fma32(2 * w, difference, old), _fma32(2.0, step, old))
    return np.where(np.isinf(old), old + difference, mean)


def _narrow_dithered(values: Reals, words: Array, code: str) -> Reals:
    """Round float64 to float32 with such random numbers; finite values and signs stay."""
    noise, power = _noise_and_power(values, words, code)
    noisy = noise.astype(np.float32).astype(np.float64) * (power * _DITHER) + values
    narrow = _float32(np.rint(noisy / (power * 2.0**-23)) * (power * 2.0**-23))
    largest = np.copysign(FLOATS["f32"].largest, values)
    narrow = np.where(np.isfinite(values) & ~np.isfinite(narrow), largest, narrow)
    return np.copysign(narrow, values)


def tensor_key(name: str, which: int = 0) -> int:
    """Return the 32-bit key of the ``which``-th average of a tensor."""
    return zlib.crc32(f"{which}/{name}".encode())


def _mix_words(x: Words) -> Words:
    """Permute 32-bit words: xor-shift and multiply, twice, and a last xor-shift.

    ``x`` needs at least one axis: NumPy warns when a scalar overflows.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    mixed: Words = x ^ (x >> np.uint32(16))
    return mixed


def random_words(seed: int, step: int, key: int, index: Array) -> Array:
    """Return 32 random bits for each element index of a tensor."""
    shape = np.shape(index)
    index = np.atleast_1d(np.asarray(index, np.uint64))
    low, *others = (number >> shift & 0xFFFFFFFF for number in (seed, step) for shift in (0, 32))
    first = np.full(index.shape, low ^ 0x9E3779B9, np.uint32)
    for number in (*others, key):
        first = _mix_words(first) ^ np.uint32(number)
    first = _mix_words(_mix_words(first) ^ (index >> np.uint64(32)).astype(np.uint32))
    second = _mix_words(first)
    x = ((index & np.uint64(0xFFFFFFFF)).astype(np.uint32) + first) * np.uint32(0x7FEB352D)
    x ^= (x >> np.uint32(16)) ^ second
    words: Array = (x * (x + x + np.uint32(1))).reshape(shape)
    return words


def split(values: Array) -> tuple[Array, Array]:
    """Split float32 into the nearest bfloat16, ties away from zero, and the low 16 bits."""
    form = FLOATS["bf16"]
    wide = decode(values, "f32")
    place = _last_place(wide, form)
    with np.errstate(invalid="ignore"):
        away = np.ldexp(np.floor(np.ldexp(np.abs(wide), -place) + 0.5), place)
        high = _overflow_to_infinity(np.where(np.isinf(wide), np.inf, away), form)
    residual = values.view(np.uint32) & np.uint32(0xFFFF)
    return encode(np.copysign(high, wide), "bf16"), residual.astype(np.uint16)


def export(avg: Array, code: str, to: str) -> Array:
    """Round an average to the dtype of the weights: from f32 to bf16, ties away from zero."""
    return split(avg)[0] if (code, to) == ("f32", "bf16") else cast(avg, code, to)


def windowed_mean(history: Array, size: int) -> NDArray[np.longdouble]:
    """Return the mean of up to ``size`` last rows of a history, in long double."""
    last = history[-size:].astype(np.longdouble)
    return np.asarray(last.sum(axis=0) / len(last), np.longdouble)


def swap(a: Array, b: Array, dst: str, src: str) -> tuple[Array, Array]:
    """Return the new ``a`` (stored as ``dst``) and ``b`` (as ``src``) after an exchange."""
    return cast(b, src, dst), cast(a, dst, src)


def lerp(avg: Array, x: Array, w: float, dst: str, src: str, words: Array | None = None) -> Array:
    """Return ``avg + w * (x - avg)`` exactly as the kernels must compute it, to the bit.

    The arithmetic is float64 if either side is, otherwise float32: round the weight, then the
    difference, then ``w * difference + avg`` once, and finally the result to the format of
    ``avg``. At ``w == 1`` the result is ``x``. Infinities and NaN follow from the formula: an
    infinite average turns finite only at weight 1, with a finite ``x``. With random words, float32
    arithmetic rounds the step as :func:`_lerp_dithered` does, and float64 the result as
    :func:`_narrow_dithered`.
    """
    if dst in _PARTS:
        storage = real_of_storage(dst), real_of_storage(src)
        parts = lerp(avg.view(storage[0]), x.view(storage[1]), w, _PARTS[dst], _PARTS[src])
        return parts.view(avg.dtype)
    old, new = decode(avg, dst), decode(x, src)
    with np.errstate(over="ignore", invalid="ignore"):
        if "f64" in (dst, src):
            result = _fma64(w, new - old, old) if w != 1 else new
            if words is not None:
                result = _narrow_dithered(result, words, dst)
        elif words is not None:
            weight = float(np.float32(w))
            result = _lerp_dithered(old, new, weight, words, dst) if weight != 1 else new
        else:
            weight = float(np.float32(w))
            difference = new.astype(np.float32) - old.astype(np.float32)
            result = _fma32(weight, difference.astype(np.float64), old) if weight != 1 else new
    return encode(result, dst) if words is None else encode_randomly(result, words, dst)


def _two_sum(x: Reals, y: Reals) -> tuple[Reals, Reals]:
    """Return ``x + y`` rounded, and the exact rounding error."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _fma32(w: float, d: Reals, z: Reals) -> Reals:
    """Return ``w * d + z`` of float32 numbers, rounded once to float32.

    The product is exact in float64, the sum nearly. Rounding the sum again is wrong only where it
    lies halfway between two float32 numbers but the exact sum does not.
    """
    form = FLOATS["f32"]
    total, rest = _two_sum(w * d, z)
    rounded = _round_to_nearest(total, form)
    half = np.ldexp(0.5, _last_place(total, form))
    halfway = (np.abs(total - rounded) == half) & (rest != 0)
    return _overflow_to_infinity(np.where(halfway, total + np.copysign(half, rest), rounded), form)


def _fma64(w: float, d: Reals, z: Reals) -> Reals:
    """Return ``w * d + z``, rounded once to float64.

    The exact value is ``total + tail``, with the tail known to 51 bits. Where both bounds of the
    tail give the same sum, it is the result; the other elements are computed as fractions.
    """
    product = w * d
    wide = _split(np.array(w)), _split(d)
    (w_high, w_low), (d_high, d_low) = wide
    left_out = w_low * d_low - (((product - w_high * d_high) - w_low * d_high) - w_high * d_low)
    total, rest = _two_sum(product, z)
    tail = rest + left_out
    spread = np.abs(tail) * 2.0**-51
    low, high = total + (tail - spread), total + (tail + spread)
    sizes = np.abs(np.stack(np.broadcast_arrays(w, d, z, product)))
    plain = ((sizes == 0) | ((sizes > 2.0**-400) & (sizes < 2.0**400))).all(axis=0)
    result = np.where(tail == 0, total, total + tail)  # a zero total keeps its sign
    for i in np.argwhere(~(plain & (low == high))):
        at = tuple(i)
        result[at] = _fma_exactly(w, float(d[at]), float(z[at]))
    return result


def _split(values: Reals) -> tuple[Reals, Reals]:
    """Split each value into two halves of 26 bits that add up to it."""
    scaled = values * (2.0**27 + 1)
    high = scaled - (scaled - values)
    return high, values - high


def _fma_exactly(w: float, d: float, z: float) -> float:
    if not (math.isfinite(w) and math.isfinite(d)):
        return w * d + z
    if not math.isfinite(z):
        return z
    exact = Fraction(w) * Fraction(d) + Fraction(z)
    if not exact:
        return w * d + z  # a zero has the sign that IEEE 754 gives it
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf
