"""What every kernel must give, in plain NumPy: the specification.

It shares no code with the kernels and rounds by other means: a number is rounded to a format by
scaling it until the format's last digit is the unit, ``rint`` and scaling back, all of which is
exact in float64.

Arrays are as stored: ``f64``, ``f32`` and ``f16`` are NumPy's floats, ``bf16`` is ``uint16`` bits,
``c64`` and ``c128`` NumPy's complex numbers, which count as pairs of reals. Every NaN is as good as
any other.
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
        """The largest finite number."""
        return math.ldexp(2.0 - math.ldexp(1.0, 1 - self.digits), self.highest)

    @property
    def smallest(self) -> float:
        """The smallest positive number, a subnormal one."""
        return math.ldexp(1.0, self.lowest - self.digits + 1)


FLOATS: Final = {
    "f64": Float(53, -1022, 1023, "float64"),
    "f32": Float(24, -126, 127, "float32"),
    "f16": Float(11, -14, 15, "float16"),
    "bf16": Float(8, -126, 127, "uint16"),
}
"""Code to format."""

_PARTS: Final = {"c64": "f32", "c128": "f64"}


def real_of(code: str) -> str:
    """The format of an element's reals: ``f32`` for ``c64``, else the code itself."""
    return _PARTS.get(code, code)


def decode(stored: Array, code: str) -> Reals:
    """The float64 numbers that stored reals stand for, exactly."""
    if code == "bf16":
        stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return stored.astype(np.float64)


def _last_place(values: Reals, form: Float) -> NDArray[np.intc]:
    """The exponent of the last digit that the format has at each value."""
    _, exponent = np.frexp(values)
    return (np.maximum(exponent, form.lowest + 1) - form.digits).astype(np.intc)


def _nearest(values: Reals, form: Float) -> Reals:
    place = _last_place(values, form)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ldexp(np.rint(np.ldexp(values, -place)), place)


def _bounded(values: Reals, form: Float) -> Reals:
    return np.where(np.abs(values) > form.largest, np.copysign(np.inf, values), values)


def encode(values: Reals, code: str) -> Array:
    """The nearest numbers of a format, ties to even, as stored."""
    form = FLOATS[code]
    if code == "f64":
        return values
    rounded = _bounded(_nearest(values, form), form)
    if code == "bf16":
        return (rounded.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return rounded.astype(form.storage)


def cast(x: Array, src: str, dst: str) -> Array:
    """``x`` in another format, rounded once to nearest even; bit for bit within one format."""
    if src == dst:
        return x.copy()
    if src in _PARTS:
        parts = encode(decode(x.view(real_of_storage(src)), _PARTS[src]), _PARTS[dst])
        return parts.view(np.complex64 if dst == "c64" else np.complex128)
    return encode(decode(x, src), dst)


def real_of_storage(code: str) -> str:
    """NumPy's name of the reals that an element is stored as."""
    return FLOATS[real_of(code)].storage


def encode_random(values: Reals, words: Array, code: str) -> Array:
    """One of the two 16-bit numbers around each value, as stored; the random word says which.

    With ``f`` the share of the way from the neighbour nearer to zero to the other one, in units of
    the bits that are rounded off (``2**-16`` for bf16, ``2**-13`` for f16), it is the other one
    where ``f`` plus the word's highest bits reaches 1. A value is taken as a float32 first, rounded
    to odd, and below the normal range of f16 as a multiple of ``2**-37``. A finite value becomes
    no infinity in bf16; beyond the largest number f16 rounds to nearest.
    """
    form = FLOATS[code]
    bits = FLOATS["f32"].digits - form.digits
    sizes = np.abs(_to_odd(values))
    place = _last_place(sizes, form)
    with np.errstate(over="ignore", invalid="ignore"):
        units = np.rint(np.ldexp(sizes, bits - place))  # whole but for subnormal results in f16
        units += np.asarray(words, np.uint16) >> np.uint16(16 - bits)
        rounded = np.ldexp(np.floor(np.ldexp(units, -bits)), place)
    if code == "bf16":
        rounded = np.where(np.isfinite(sizes), np.minimum(rounded, form.largest), sizes)
    else:
        rounded = np.where(sizes > form.largest, _bounded(_nearest(sizes, form), form), rounded)
    return encode(np.copysign(rounded, values), code)


def _to_odd(values: Reals) -> Reals:
    """The float32 numbers equal to values, or the odd one of the two around each."""
    form = FLOATS["f32"]
    place = _last_place(values, form)
    with np.errstate(over="ignore", invalid="ignore"):
        units = np.abs(np.ldexp(values, -place))
        whole = np.floor(units)
        whole += (units != whole) & (whole % 2 == 0)
        rounded = np.copysign(np.ldexp(whole, place), values)
    largest = np.copysign(form.largest, values)
    beyond = np.isfinite(values) & (np.abs(values) > form.largest)
    return np.where(np.isfinite(values), np.where(beyond, largest, rounded), values)


def tensor_key(name: str, which: int = 0) -> int:
    """32 bits that tell the ``which``-th average of a tensor from those of others."""
    return zlib.crc32(f"{which}/{name}".encode())


def _mixed(x: Words) -> Words:
    """A permutation of 32-bit words: xor-shift and multiply, twice, and a last xor-shift.

    Of one word or more along axes: NumPy warns where a number without axes overflows.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    mixed: Words = x ^ (x >> np.uint32(16))
    return mixed


def random_words(seed: int, step: int, key: int, index: Array) -> Array:
    """Sixteen random bits for each element of a tensor."""
    shape = np.shape(index)
    index = np.atleast_1d(np.asarray(index, np.uint64))
    low, *others = (number >> shift & 0xFFFFFFFF for number in (seed, step) for shift in (0, 32))
    first = np.full(index.shape, low ^ 0x9E3779B9, np.uint32)
    for number in (*others, key):
        first = _mixed(first) ^ np.uint32(number)
    first = _mixed(_mixed(first) ^ (index >> np.uint64(32)).astype(np.uint32))
    second = _mixed(first)
    x = ((index & np.uint64(0xFFFFFFFF)).astype(np.uint32) ^ first) * np.uint32(0x7FEB352D)
    x ^= (x >> np.uint32(16)) ^ second
    x *= x + x + np.uint32(1)
    words: Array = (x >> np.uint32(16)).astype(np.uint16).reshape(shape)
    return words


def split(values: Array) -> tuple[Array, Array]:
    """A float32 in two halves: the nearest bfloat16, ties away from zero, and the low 16 bits."""
    form = FLOATS["bf16"]
    wide = decode(values, "f32")
    place = _last_place(wide, form)
    with np.errstate(invalid="ignore"):
        away = np.ldexp(np.floor(np.ldexp(np.abs(wide), -place) + 0.5), place)
        high = _bounded(np.where(np.isinf(wide), np.inf, away), form)
    residual = values.view(np.uint32) & np.uint32(0xFFFF)
    return encode(np.copysign(high, wide), "bf16"), residual.astype(np.uint16)


def windowed_mean(history: Array, size: int) -> NDArray[np.longdouble]:
    """The mean of the last ``size`` rows of a history, or of all, in the widest floats."""
    last = history[-size:].astype(np.longdouble)
    return np.asarray(last.sum(axis=0) / len(last), np.longdouble)


def swap(a: Array, b: Array, dst: str, src: str) -> tuple[Array, Array]:
    """What ``a`` (stored as ``dst``) and ``b`` (as ``src``) hold after they were exchanged."""
    return cast(b, src, dst), cast(a, dst, src)


def lerp(avg: Array, x: Array, w: float, dst: str, src: str, words: Array | None = None) -> Array:
    """``avg + w * (x - avg)`` as the kernels promise it, to the bit.

    In float64 where either side is, else in float32: the weight is rounded, then the difference,
    then ``w * difference + avg`` once, and what comes out once more to the format of ``avg``. At
    ``w == 1`` it is ``x``. Infinities and NaN follow from the formula: an infinite average stays
    infinite only against finite ``x`` of weight 1.
    """
    if dst in _PARTS:
        storage = real_of_storage(dst), real_of_storage(src)
        parts = lerp(avg.view(storage[0]), x.view(storage[1]), w, _PARTS[dst], _PARTS[src])
        return parts.view(avg.dtype)
    old, new = decode(avg, dst), decode(x, src)
    with np.errstate(over="ignore", invalid="ignore"):
        if "f64" in (dst, src):
            result = _fma64(w, new - old, old) if w != 1 else new
        else:
            weight = float(np.float32(w))
            difference = new.astype(np.float32) - old.astype(np.float32)
            result = _fma32(weight, difference.astype(np.float64), old) if weight != 1 else new
    return encode(result, dst) if words is None else encode_random(result, words, dst)


def _two_sum(x: Reals, y: Reals) -> tuple[Reals, Reals]:
    """``x + y`` rounded, and exactly what the rounding left out."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _fma32(w: float, d: Reals, z: Reals) -> Reals:
    """``w * d + z`` rounded once to float32; all are float32 numbers.

    The product is exact in float64 and the sum nearly so: rounding it again to float32 goes wrong
    only where it lies halfway between two float32 numbers without the exact sum doing so.
    """
    form = FLOATS["f32"]
    total, rest = _two_sum(w * d, z)
    rounded = _nearest(total, form)
    half = np.ldexp(0.5, _last_place(total, form))
    halfway = (np.abs(total - rounded) == half) & (rest != 0)
    return _bounded(np.where(halfway, total + np.copysign(half, rest), rounded), form)


def _fma64(w: float, d: Reals, z: Reals) -> Reals:
    """``w * d + z`` rounded once to float64.

    The exact value is ``total + tail`` with a tail known to 51 bits. Where both ends of what the
    tail may be give the same sum, that is the result; the rest is done in fractions.
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
        result[at] = _exactly(w, float(d[at]), float(z[at]))
    return result


def _split(values: Reals) -> tuple[Reals, Reals]:
    """Two halves of 26 bits each that add up to the value."""
    scaled = values * (2.0**27 + 1)
    high = scaled - (scaled - values)
    return high, values - high


def _exactly(w: float, d: float, z: float) -> float:
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
