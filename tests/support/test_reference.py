"""The reference itself, checked against exact fractions and the formats' definitions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from . import reference
from .arrays import assert_same, numbers

WEIGHTS = [0.3, 1e-4, 0.5, 1.0, 0.0, -0.7, 1.75]


def _infinity(code: str) -> int:
    return int(reference.encode(np.array([np.inf]), code).view(np.uint16)[0])


def _value(pattern: int, form: reference.Float) -> Fraction:
    """Return the number that a bit pattern stands for, by the definition of the format."""
    exponent, fraction = divmod(pattern, 1 << (form.digits - 1))
    if exponent:
        fraction += 1 << (form.digits - 1)
    return fraction * Fraction(2) ** (max(exponent, 1) + form.lowest - form.digits)


@pytest.mark.parametrize("code", ["f16", "bf16"])
def test_decode_of_every_16_bit_pattern_is_exact(code: str) -> None:
    form = reference.FLOATS[code]
    got = reference.decode(np.arange(1 << 16, dtype=np.uint16).view(form.storage), code)
    infinite = _infinity(code)
    want = np.array([float(_value(pattern, form)) for pattern in range(infinite)])
    np.testing.assert_array_equal(got[:infinite], want)
    np.testing.assert_array_equal(got[0x8000 : 0x8000 + infinite], -want)
    assert np.signbit(got[0x8000 : 0x8000 + infinite]).all()
    np.testing.assert_array_equal(got[[infinite, 0x8000 + infinite]], [math.inf, -math.inf])
    assert np.isnan(got[infinite + 1 : 0x8000]).all()
    assert np.isnan(got[0x8000 + infinite + 1 :]).all()
    assert (form.smallest, form.largest) == (want[1], want[-1])


@pytest.mark.parametrize("code", ["f16", "bf16"])
def test_encode_rounds_around_every_midpoint_to_nearest_even(code: str) -> None:
    patterns = np.arange(_infinity(code), dtype=np.uint16)
    form = reference.FLOATS[code]
    low = reference.decode(patterns.view(form.storage), code)
    middle = (low + np.append(low[1:], 2.0 ** (form.highest + 1))) / 2
    for sign, bit in ((1.0, 0), (-1.0, 0x8000)):

        def encoded(values: np.ndarray, sign: float = sign) -> np.ndarray:
            return reference.encode(sign * values, code).view(np.uint16)

        np.testing.assert_array_equal(encoded(low), patterns | bit)
        np.testing.assert_array_equal(encoded(np.nextafter(middle, 0)), patterns | bit)
        np.testing.assert_array_equal(encoded(middle), (patterns + (patterns & 1)) | bit)
        np.testing.assert_array_equal(encoded(np.nextafter(middle, np.inf)), (patterns + 1) | bit)


def _fused(w: float, d: float, z: float) -> Fraction | float:
    if all(map(math.isfinite, (w, d, z))):
        return Fraction(w) * Fraction(d) + Fraction(z)
    return z if math.isfinite(w) and math.isfinite(d) else w * d + z


@pytest.mark.parametrize("kind", ["weights", "bits"])
@pytest.mark.parametrize(("dst", "src"), [("f32", "f32"), ("f64", "f64"), ("f32", "bf16")])
def test_lerp_rounds_difference_fma_and_result_once_each(dst: str, src: str, kind: str) -> None:
    avg, x = numbers(400, dst, 5, kind), numbers(400, src, 6, kind)
    real = np.float64 if dst == "f64" else np.float32
    with np.errstate(all="ignore"):
        old, new = avg.astype(real), reference.decode(x, src).astype(real)
        difference = (new - old).astype(np.float64)
        for w in WEIGHTS:
            want = reference.decode(x, src)
            if w != 1:
                sides = zip(difference.tolist(), old.tolist(), strict=True)
                sums = [_fused(float(real(w)), d, z) for d, z in sides]
                want = np.array([_as_real(one, dst) for one in sums])
            got = reference.lerp(avg, x, w, dst, src)
            # Fractions have no signed zero; the kernels' tests compare its sign.
            assert_same(got + real(0), (want.astype(real) + real(0)), dst)


def _as_real(exact: Fraction | float, code: str) -> float:
    if isinstance(exact, float):
        return exact
    form = reference.FLOATS[code]
    if not exact:
        return 0.0
    size = abs(exact)
    place = size.numerator.bit_length() - size.denominator.bit_length()
    place += Fraction(2) ** place <= size
    place = max(place, form.lowest + 1) - form.digits
    rounded = round(exact / Fraction(2) ** place) * Fraction(2) ** place  # Python's ties to even
    if abs(rounded) > form.largest:
        return math.inf if exact > 0 else -math.inf
    return float(rounded)


ALL_WORDS = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
SIXTEEN = {"bf16": [1.7, 3.3895e38, 1e-39, 2.0**-133], "f16": [1.7, 60000.3, 3e-5, 5e-8, 65504.0]}


def _grid(values: np.ndarray, code: str) -> np.ndarray:
    """Return the inputs of random rounding: float32, small f16 ones as multiples of 2**-37."""
    narrow = values.astype(np.float32).astype(np.float64)
    small = np.abs(narrow) < 2.0**-14
    return (
        np.where(small, np.rint(narrow * 2.0**37) * 2.0**-37, narrow) if code == "f16" else narrow
    )


@pytest.mark.parametrize("code", SIXTEEN)
def test_random_rounding_picks_a_neighbor_and_is_unbiased(code: str) -> None:
    random = np.random.default_rng(3).normal(size=40) * 2.0 ** np.arange(-20, 20) * 0.05
    grid = _grid(np.array([*SIXTEEN[code], *random, *(-random)]), code)
    for value in grid[np.abs(grid) <= reference.FLOATS[code].largest]:
        stored = reference.encode_randomly(np.full(1 << 16, value), ALL_WORDS, code)
        got = reference.decode(stored, code)
        below, above = got.min(), got.max()
        assert below <= value <= above
        patterns = np.unique(stored.view(np.uint16)).astype(int)
        assert len(patterns) <= 2
        assert np.ptp(patterns) <= 1
        # Sums of these numbers are exact, and so is the mean over all words.
        np.testing.assert_array_equal(got.mean(), value)
        # A larger word never rounds closer to zero.
        assert (np.diff(np.abs(got)) >= 0).all()


def test_split_gives_the_nearest_bfloat16_and_the_low_bits() -> None:
    values = np.concatenate([numbers(20_000, "f32", 1), numbers(20_000, "f32", 2, "bits")])
    ties = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000)).view("f4")
    values = np.concatenate([values, ties])
    values = values[~np.isnan(values)]
    high, residual = reference.split(values)
    bits = values.view(np.uint32)
    wide = high.astype(np.uint32) << np.uint32(16)
    borrowed = (residual.astype(np.uint32) >> np.uint32(15)) << np.uint32(16)
    np.testing.assert_array_equal(wide - borrowed + residual, bits)
    tie = (bits & 0xFFFF) == 0x8000
    nearest = reference.encode(values.astype(np.float64), "bf16")
    np.testing.assert_array_equal(high[~tie], nearest[~tie])
    np.testing.assert_array_equal(high[tie], (bits[tie] >> 16) + 1)
    infinite = reference.split(np.array([np.inf, -np.inf], np.float32))
    np.testing.assert_array_equal(infinite, [[0x7F80, 0xFF80], [0, 0]])


def test_windowed_mean_equals_the_mean_of_fractions() -> None:
    history = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    for steps in (1, 4, 5, 6, 50):
        got = reference.windowed_mean(history[:steps], 5)
        for i, value in enumerate(got):
            last = [Fraction(float(x)) for x in history[:steps][-5:, i]]
            assert float(value) == pytest.approx(float(sum(last) / len(last)), rel=1e-15)
