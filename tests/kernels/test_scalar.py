"""The math of one element, in plain Python and compiled, against the specification."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from numba import njit

from fastema.kernels import formats, scalar
from fastema.kernels.jit import device_fn

from ..support import reference
from ..support.arrays import assert_same, numbers

WEIGHTS = [0.3, 1e-3, 0.5, 1.0, 0.0, 1 - 2.0**-24, -0.7, 1.75, 1e-42]
EDGES = {
    "f32": [0.0, 1.0, 1 + 2.0**-23, 3.1415927, 1.4e-45, 1.1754942e-38, 3.4028235e38, np.inf],
    "f64": [0.0, 1.0, 1 + 2.0**-52, 3.141592653589793, 5e-324, 2.2e-308, 1.79e308, np.inf],
}

Array = np.ndarray


def midpoints(code: str) -> Array:
    """Return the midpoint between each finite value and the next one, as float64."""
    infinite = 0x7C00 if code == "f16" else 0x7F80
    patterns = np.arange(infinite, dtype=np.uint16)
    low = reference.decode(patterns.view(reference.FLOATS[code].storage), code)
    return (low + np.append(low[1:], 2.0 ** (reference.FLOATS[code].highest + 1))) / 2


def around(points: Array, kind: type) -> Array:
    """Return the points and their neighbors in a wider format, with both signs."""
    points = points.astype(kind)
    far = np.array([np.inf, np.nan, 1e-44], kind)
    sides = [np.nextafter(points, kind(0)), points, np.nextafter(points, kind(np.inf)), far]
    return np.concatenate([*sides, *(-side for side in sides)])


def run_compiled(function: Callable[..., object], result: type, values: Array) -> Array:
    @njit
    def run(out, values):
        for i in range(len(values)):
            out[i] = function(values[i])

    out = np.empty(len(values), result)
    run(out, values)
    return out


def check(
    function: Callable[..., object], values: Array, want: Array, code: str, every: int
) -> None:
    """Check a function: compiled on all values, and in plain Python on some of them."""
    kind = np.dtype(np.uint16) if want.dtype.itemsize == 2 else want.dtype
    assert_same(run_compiled(function, kind, values).view(want.dtype), want, code)
    with np.errstate(all="ignore"):
        in_python = np.array([function(value) for value in values[::every]], kind)
    assert_same(in_python.view(want.dtype), want[::every], code)


@pytest.mark.parametrize("code", EDGES)
def test_lerp_matches_the_specification(code: str) -> None:
    real = np.dtype(reference.FLOATS[code].storage).type
    signed = [sign * edge for edge in EDGES[code] for sign in (1, -1)] + [np.nan]
    cross = np.array(list(product(signed, signed)), real)
    random = [numbers(400, code, seed, kind) for seed in (1, 2) for kind in ("weights", "bits")]
    avg, x = np.concatenate([cross.T, np.array(random).reshape(2, -1)], axis=1)
    for weight in WEIGHTS:
        with np.errstate(all="ignore"):
            got = [scalar.lerp(a, b, real(weight)) for a, b in zip(avg, x, strict=True)]
        assert all(type(one) is real for one in got)
        assert_same(np.array(got), reference.lerp(avg, x, weight, code, code), code)


CODES = {"bf16": scalar.encode_bf16, "f16": scalar.encode_f16}


@pytest.mark.parametrize("code", CODES)
def test_f32_is_rounded_to_nearest_even_and_nan_stays_nan(code: str) -> None:
    random = numbers(200_000, "f32", 8, "bits")
    values = np.concatenate([around(midpoints(code), np.float32), random])
    fractions = np.concatenate([[1, 0x7FFFFF, 0x400000], random.view(np.uint32)[:2000] >> 9 | 1])
    nan = (fractions | 0x7F800000).astype(np.uint32)
    values = np.concatenate([values, (nan | np.uint32(0x80000000)).view(np.float32)])
    values = np.concatenate([values, nan.view(np.float32)])
    with np.errstate(all="ignore"):
        want = reference.cast(values, "f32", code)
    check(CODES[code], values, want, code, 53)
    signs = run_compiled(CODES[code], np.uint16, nan.view(np.float32)) >> 15
    assert not signs.any()


@pytest.mark.parametrize("code", CODES)
def test_f64_is_rounded_once(code: str) -> None:
    # So close to a midpoint that rounding to float32 first gives a wrong result.
    middle = midpoints(code)
    near = [around(middle, np.float64), around(middle * (1 + 2.0**-40), np.float64)]
    values = np.concatenate([*near, numbers(20_000, "f64", 6, "bits")])
    want = reference.cast(values, "f64", code)
    with np.errstate(all="ignore"):
        twice = reference.cast(values.astype(np.float32), "f32", code)
    assert np.count_nonzero(twice.view(np.uint16) != want.view(np.uint16)) > 10_000
    encode_wide = formats.FORMATS[code].encode_wide

    @device_fn
    def encode(value):
        return encode_wide(value, np.uint32(0xFFFF))  # not stochastic

    check(encode, values, want, code, 71)


def test_index_of_is_exact_in_runs_of_any_length() -> None:
    """Its float32 division must give the integer quotient."""

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
