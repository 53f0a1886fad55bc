"""The maths of one element, as plain Python and compiled, against the specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from fastema.kernels import formats, scalar
from fastema.kernels.jit import device_fn

from ..support import reference

HALVES = np.arange(1 << 16, dtype=np.uint16)
WEIGHTS = [0.3, 1e-3, 0.5, 1.0, 0.0, 1 - 2.0**-24, -0.7, 1.75, 1e-42]
F32_EDGES = [0.0, 1.0, 1 + 2.0**-23, 3.1415927, 1.4e-45, 1.1754942e-38, 3.4028235e38, np.inf]
F64_EDGES = [0.0, 1.0, 1 + 2.0**-52, 3.141592653589793, 5e-324, 2.2e-308, 1.79e308, np.inf]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def midpoints(code: str) -> np.ndarray:
    """Every finite pattern's value and the middle to the next one, as float64."""
    infinite = 0x7C00 if code == "f16" else 0x7F80
    patterns = np.arange(infinite, dtype=np.uint16)
    low = reference.decode(patterns.view(reference.FLOATS[code].storage), code)
    return (low + np.append(low[1:], 2.0 ** (reference.FLOATS[code].highest + 1))) / 2


def around(points: np.ndarray, kind: type) -> np.ndarray:
    """The points and their neighbours in a wider format, of both signs."""
    points = points.astype(kind)
    far = np.array([np.inf, np.nan, 1e-44], kind)
    sides = [np.nextafter(points, kind(0)), points, np.nextafter(points, kind(np.inf)), far]
    return np.concatenate([*sides, *(-side for side in sides)])


def compiled(function: Callable[..., object], result: type, values: np.ndarray) -> np.ndarray:
    @njit
    def run(out, values):
        for i in range(len(values)):
            out[i] = function(values[i])

    out = np.empty(len(values), result)
    run(out, values)
    return out


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_lerp_in_python_is_the_specification(
    real: type, numbers: Callable[..., np.ndarray], assert_same: Callable[..., None]
) -> None:
    code = "f32" if real is np.float32 else "f64"
    edges = F32_EDGES if code == "f32" else F64_EDGES
    signed = [sign * edge for edge in edges for sign in (1, -1)] + [np.nan]
    cross = np.array(list(product(signed, signed)), real)
    random = [numbers(400, code, seed, kind) for seed in (1, 2) for kind in ("weights", "bits")]
    avg = np.concatenate([cross[:, 0], *random[:2]])
    x = np.concatenate([cross[:, 1], *random[2:]])
    for weight in WEIGHTS:
        w = real(weight)
        with np.errstate(all="ignore"):
            got = [scalar.lerp(a, b, w) for a, b in zip(avg, x, strict=True)]
        assert all(type(one) is real for one in got)
        want = reference.lerp(avg, x, weight, code, code)
        assert_same(np.array(got), want, code)


@given(FINITE, st.floats(0, 1, width=32))
def test_lerp_of_equal_numbers_is_a_fixed_point(value: float, weight: float) -> None:
    x = np.float32(value)
    assert scalar.lerp(x, x, np.float32(weight)) == x


@given(st.floats(width=32), FINITE)
def test_lerp_of_weight_one_is_the_new_value(avg: float, x: float) -> None:
    got = scalar.lerp(np.float32(avg), np.float32(x), np.float32(1))
    assert got.view(np.uint32) == np.float32(x).view(np.uint32)


@given(FINITE, FINITE, st.floats(0, 1, width=32))
def test_lerp_lies_between_both(avg: float, x: float, weight: float) -> None:
    a, b, w = np.float32(avg), np.float32(x), np.float32(weight)
    with np.errstate(over="ignore", invalid="ignore"):
        difference = b - a
        got = scalar.lerp(a, b, w)
    if np.isfinite(difference):
        # The difference is rounded before it is weighted: at most one unit of it past x.
        slack = math.ulp(float(difference)) * 2**29
        assert min(float(a), float(b)) - slack <= float(got) <= max(float(a), float(b)) + slack


def test_bf16_decodes_exactly(assert_same: Callable[..., None]) -> None:
    want = reference.cast(HALVES, "bf16", "f32")
    assert_same(compiled(scalar.decode_bf16, np.float32, HALVES), want, "f32")
    got = np.array([scalar.decode_bf16(word) for word in HALVES[::31]])
    assert_same(got, want[::31], "f32")


CODES = {"bf16": scalar.encode_bf16, "f16": scalar.encode_f16}


@pytest.mark.parametrize("code", CODES)
def test_f32_is_rounded_to_nearest_even(
    code: str, numbers: Callable[..., np.ndarray], assert_same: Callable[..., None]
) -> None:
    values = np.concatenate(
        [around(midpoints(code), np.float32), numbers(50_000, "f32", 5, "bits")]
    )
    want = reference.cast(values, "f32", code).view(np.uint16)
    encode = CODES[code]
    storage = reference.FLOATS[code].storage
    got = compiled(encode, np.uint16, values)
    assert_same(got.view(storage), want.view(storage), code)
    some = slice(None, None, 53)
    with np.errstate(all="ignore"):
        got = np.array([encode(value) for value in values[some]], np.uint16)
    assert_same(got.view(storage), want[some].view(storage), code)


def test_what_comes_of_bf16_is_rounded_as_any_float(numbers: Callable[..., np.ndarray]) -> None:
    """But for its NaN, of which only those with nothing in their low half come up there."""
    quiet = np.array([0x7FC00000, 0xFFC00000, 0x7FFF0000, 0xFF810000], np.uint32).view(np.float32)
    random = numbers(50_000, "f32", 5, "bits")
    values = np.concatenate([around(midpoints("bf16"), np.float32), random])
    values = np.concatenate([values[~np.isnan(values)], quiet])
    want = compiled(scalar.encode_bf16, np.uint16, values)
    want[-1] = 0xFF81  # signalling, and left so
    np.testing.assert_array_equal(compiled(scalar.encode_bf16_of_bf16, np.uint16, values), want)
    some = slice(None, None, 97)
    got = np.array([scalar.encode_bf16_of_bf16(value) for value in values[some]])
    np.testing.assert_array_equal(got, want[some])


@pytest.mark.parametrize("code", CODES)
def test_f64_is_rounded_once(
    code: str, numbers: Callable[..., np.ndarray], assert_same: Callable[..., None]
) -> None:
    # Just beside a midpoint, by less than float32 can tell: two roundings to nearest go wrong.
    middle = midpoints(code)
    values = np.concatenate(
        [
            around(middle, np.float64),
            around(middle * (1 + 2.0**-40), np.float64),
            numbers(20_000, "f64", 6, "bits"),
        ]
    )
    want = reference.cast(values, "f64", code)
    with np.errstate(all="ignore"):
        twice = reference.cast(values.astype(np.float32), "f32", code)
    assert np.count_nonzero(twice.view(np.uint16) != want.view(np.uint16)) > 10_000
    encode_wide = formats.FORMATS[code].encode_wide

    @device_fn
    def encode(value):
        return encode_wide(value, np.uint32(0xFFFF))  # not rounded by random bits

    assert_same(compiled(encode, np.uint16, values).view(want.dtype), want, code)
    some = slice(None, None, 71)
    with np.errstate(all="ignore"):
        got = np.array([encode(value) for value in values[some]], np.uint16)
    assert_same(got.view(want.dtype), want[some], code)


def test_f16_by_integers_is_the_specification(
    numbers: Callable[..., np.ndarray], assert_same: Callable[..., None]
) -> None:
    decoded = reference.cast(HALVES.view(np.float16), "f16", "f32")
    assert_same(compiled(scalar.decode_f16, np.float32, HALVES), decoded, "f32")
    with np.errstate(all="ignore"):
        in_python = np.array([scalar.decode_f16(word) for word in HALVES[::7]])
    assert_same(in_python, decoded[::7], "f32")
    floats = np.concatenate(
        [around(midpoints("f16"), np.float32), numbers(200_000, "f32", 8, "bits")]
    )
    with np.errstate(all="ignore"):
        encoded = reference.cast(floats, "f32", "f16")
    assert_same(compiled(scalar.encode_f16, np.uint16, floats).view(np.float16), encoded, "f16")


def test_nan_stays_nan_in_sixteen_bits() -> None:
    generator = np.random.default_rng(4)
    fractions = np.concatenate([[1, 0x7FFFFF, 0x400000], generator.integers(1, 1 << 23, 2000)])
    for sign in (0, 0x80000000):
        pattern = (fractions | 0x7F800000 | sign).astype(np.uint32)
        for code, encode in CODES.items():
            form = reference.FLOATS[code].storage
            got = compiled(encode, np.uint16, pattern.view(np.float32))
            assert np.isnan(reference.decode(got.view(form), code)).all()
            np.testing.assert_array_equal(got >> 15, pattern >> 31)


def test_index_of_every_place_in_a_row() -> None:
    """Whatever the length of the runs: the quotient is one of whole numbers."""

    @njit
    def rows(out, runs, first, step, jump):
        for k in range(len(runs)):
            run = runs[k]
            rise = np.uint32(jump - run * step)
            inverse = np.float32(1) / np.float32(run)
            for place in range(out.shape[1]):
                out[k, place] = scalar.index_of(
                    np.uint32(place), np.uint32(first), np.uint32(step), rise, inverse
                )

    few = [*range(1, 130), 147, 255, 256, 257, 511, 512, 1000, 1023, 4097, 32_767, 65_535, 65_536]
    runs = np.array([*few, *np.random.default_rng(1).integers(130, 1 << 16, 60), 2**40])
    first, step, jump = 2**32 - 7, 49, 10_007
    got = np.empty((len(runs), 1 << 16), np.uint32)
    rows(got, runs, first, step, jump)
    places = np.arange(1 << 16)
    for run, found in zip(runs, got, strict=True):
        want = (first + places // run * jump + places % run * step) % 2**32
        np.testing.assert_array_equal(found, want)
        for place in (0, int(run) - 1, int(run), 65_535):
            if place < 1 << 16:
                rise = np.uint32((jump - int(run) * step) % 2**32)
                args = np.uint32(first), np.uint32(step), rise, np.float32(1) / np.float32(run)
                assert scalar.index_of(np.uint32(place), *args) == want[place]


def test_park_is_undone_to_the_bit(numbers: Callable[..., np.ndarray]) -> None:
    pattern = numbers(3000, "u32", 1, "bits")
    ties = (pattern & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    nans = (pattern & np.uint32(0x807FFFFF)) | np.uint32(0x7F800000)
    some = numbers(500, "f32", 3).view(np.uint32)
    avg = np.concatenate([pattern, ties, nans, nans & np.uint32(0xFF80FFFF), some])
    weight = numbers(len(avg), "u16", 2, "bits")
    for a, raw in zip(avg, weight, strict=True):
        model, parked = scalar.park_model(a), scalar.park_shadow(a, raw)
        assert model.dtype == np.uint16
        assert scalar.unpark_model(parked) == raw
        back = scalar.unpark_shadow(model, parked)
        lost = 0x7F800000 < a & 0x7FFFFFFF < 0x7F810000  # no NaN that has come from arithmetic
        assert back == (a | 0x400000 if lost else a)


def test_stowed_bits_come_back(numbers: Callable[..., np.ndarray]) -> None:
    pattern = numbers(3000, "u32", 1, "bits")
    nans = (pattern & np.uint32(0x807FFFFF)) | np.uint32(0x7F800000)
    for bits in np.concatenate([pattern, nans, nans & np.uint32(0xFF80FFFF)]):
        low = np.uint16(bits & 0xFFFF)
        assert scalar.unstowed(scalar.stowed_high(bits), low) == bits
        half = scalar.split_high(bits.view(np.float32))  # as an average has it
        whole = scalar.unstowed(half, low)
        assert whole == scalar.join_halves(half, low).view(np.uint32)
        assert scalar.stowed_high(whole) == half


def test_park_gives_the_model_the_nearest(numbers: Callable[..., np.ndarray]) -> None:
    avg = np.concatenate(
        [
            numbers(4000, "f32", 1),
            numbers(4000, "f32", 2, "bits"),
            around(midpoints("bf16"), np.float32)[::9],
        ]
    )
    model = np.array([scalar.park_model(pattern) for pattern in avg.view(np.uint32)])
    want = reference.cast(avg, "f32", "bf16")
    finite = np.isfinite(avg)
    value, exact = reference.decode(model, "bf16"), reference.decode(avg, "f32")
    tie = finite & (avg.view(np.uint32) & 0xFFFF == 0x8000)
    assert tie.any()
    np.testing.assert_array_equal(model[finite & ~tie], want[finite & ~tie])
    # Of two that are as near, the one further from zero.
    np.testing.assert_array_equal(model[tie], (avg.view(np.uint32)[tie] >> 16) + 1)
    assert (np.abs(value) >= np.abs(exact))[tie].all()
    np.testing.assert_array_equal(np.isnan(value), np.isnan(exact))
    np.testing.assert_array_equal(model[np.isinf(avg)], want[np.isinf(avg)])
