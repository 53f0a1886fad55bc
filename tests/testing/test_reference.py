"""The specification is itself checked: against fractions, and against other people's rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from fastema.testing import reference
from fastema.testing.tolerance import cast_bound, exact_lerp, lerp_bound, unit_roundoff

FLOATS = list(reference.FLOATS)
WEIGHTS = [0.3, 1e-4, 0.5, 1.0, 0.0, -0.7, 1.75]


def _infinity(code: str) -> int:
    return int(reference.encode(np.array([np.inf]), code).view(np.uint16)[0])


def _value(pattern: int, form: reference.Float) -> Fraction:
    """The number that a pattern of exponent and digits stands for, from the definition."""
    exponent, fraction = divmod(pattern, 1 << (form.digits - 1))
    if exponent:
        fraction += 1 << (form.digits - 1)
    return fraction * Fraction(2) ** (max(exponent, 1) + form.lowest - form.digits)


@pytest.mark.parametrize("code", ["f16", "bf16"])
def test_decode_every_pattern(code: str) -> None:
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
def test_encode_around_every_midpoint(code: str) -> None:
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


@pytest.mark.parametrize("code", ["f32", "f16"])
def test_encode_agrees_with_numpy(
    code: str, numbers: Callable[..., np.ndarray], assert_same: Callable[..., None]
) -> None:
    storage = reference.FLOATS[code].storage
    values = np.concatenate([numbers(9000, "f64", 1, "bits"), numbers(9000, "f64", 2) * 2.0**-20])
    with np.errstate(all="ignore"):
        assert_same(reference.encode(values, code), values.astype(storage), code)


def _fused(w: float, d: float, z: float) -> Fraction | float:
    if all(map(math.isfinite, (w, d, z))):
        return Fraction(w) * Fraction(d) + Fraction(z)
    return z if math.isfinite(w) and math.isfinite(d) else w * d + z


@pytest.mark.parametrize("kind", ["weights", "bits"])
@pytest.mark.parametrize(("dst", "src"), [("f32", "f32"), ("f64", "f64"), ("f32", "bf16")])
def test_lerp_rounds_where_it_says(
    dst: str,
    src: str,
    kind: str,
    numbers: Callable[..., np.ndarray],
    assert_same: Callable[..., None],
) -> None:
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
            # The sign of an exact zero is not in a fraction; the kernels' tests compare it.
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


@pytest.mark.parametrize("dst", FLOATS)
@pytest.mark.parametrize("src", FLOATS)
def test_lerp_is_within_its_bound(dst: str, src: str, numbers: Callable[..., np.ndarray]) -> None:
    avg, x = numbers(5000, dst, 7), numbers(5000, src, 8)
    for w in WEIGHTS:
        got = reference.decode(reference.lerp(avg, x, w, dst, src), dst)
        error = np.abs(got - exact_lerp(avg, x, w, dst, src)).astype(np.float64)
        np.testing.assert_array_less(error, lerp_bound(avg, x, w, dst, src))


@pytest.mark.parametrize("code", FLOATS)
def test_cast_bound_is_reached_by_ties_only(code: str) -> None:
    u = unit_roundoff(code)
    assert reference.decode(reference.encode(np.array([1 + 2 * u]), code), code) == [1 + 2 * u]
    if code != "f64":
        assert reference.decode(reference.encode(np.array([1 + u]), code), code) == [1.0]
    form = reference.FLOATS[code]
    np.testing.assert_array_equal(cast_bound(np.zeros(1), code), [form.smallest / 2])


def test_complex_numbers_are_pairs(numbers: Callable[..., np.ndarray]) -> None:
    avg, x = numbers(50, "c64", 1), numbers(50, "c128", 2)
    got = reference.lerp(avg, x, 0.3, "c64", "c128")
    assert got.dtype == np.complex64
    for part in ("real", "imag"):
        pieces = [np.ascontiguousarray(getattr(side, part)) for side in (avg, x)]
        want = reference.lerp(*pieces, 0.3, "f32", "f64")
        np.testing.assert_array_equal(getattr(got, part), want)
    np.testing.assert_array_equal(reference.cast(x, "c128", "c64"), x.astype(np.complex64))
