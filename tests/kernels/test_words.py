"""Every function of `words` gives the same result in plain Python and in a kernel."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from numba import njit

from fastema.kernels import formats, scalar, words

from ..support import reference
from ..support.arrays import assert_same, numbers

HALVES = np.arange(1 << 16, dtype=np.uint16)
TINY, HUGE = 1.4e-45, 3.4028235e38
REALS = [0.0, -0.0, 1.0, -1.0, 3.1415927, TINY, -TINY, 1.1754944e-38, HUGE, -HUGE, np.inf, np.nan]
KINDS = {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
U16, U32, F32 = np.dtype(np.uint16), np.dtype(np.uint32), KINDS["f32"]

Array = np.ndarray

converts_half = pytest.mark.skipif(
    not formats.CONVERTS_HALF, reason="the processor compiled for cannot convert halves"
)


def run_compiled(word: Callable[..., object], result: np.dtype, *columns: Array) -> Array:
    """Run a word in a compiled loop, where it is vectorized."""
    names = "abc"[: len(columns)]
    loop = f"def loop(out, {', '.join(names)}):\n    for i in range(len(out)):\n"
    loop += f"        out[i] = word({', '.join(f'{name}[i]' for name in names)})\n"
    scope: dict[str, Any] = {"word": word}
    exec(loop, scope)
    out = np.empty(len(columns[0]), result)
    njit(scope["loop"])(out, *columns)
    return out


def run_python(word: Callable[..., object], result: np.dtype, *columns: Array) -> Array:
    values = [word(*row) for row in zip(*columns, strict=True)]
    assert all(np.result_type(value) == result for value in values)
    return np.array(values, result)


def check(word: Callable[..., object], want: Array, *columns: Array, every: int = 1) -> None:
    """Check a word to the bit, except NaN bits: compiled on all rows, in Python on some."""
    code = {"float32": "f32", "float64": "f64"}.get(want.dtype.name, "u32")
    assert_same(run_compiled(word, want.dtype, *columns), want, code)
    some = [column[::every] for column in columns]
    with np.errstate(all="ignore"):
        assert_same(run_python(word, want.dtype, *some), want[::every], code)


@pytest.mark.parametrize("code", KINDS)
def test_nan_becomes_zero(code: str) -> None:
    kind = KINDS[code]
    values = np.concatenate([np.array([*REALS, -np.nan], kind), numbers(3000, code, 1)])
    assert np.isnan(values).sum() == 2
    check(words.nan_to_zero, np.where(np.isnan(values), kind.type(0), values), values)


@converts_half
def test_halves_and_floats_convert_exactly_around_every_half() -> None:
    want = reference.cast(HALVES.view(np.float16), "f16", "f32")
    check(words.half_to_float, want, HALVES)
    finite = np.sort(reference.decode(np.arange(0x7C00, dtype=np.uint16).view(np.float16), "f16"))
    middle = ((finite + np.append(finite[1:], 65536.0)) / 2).astype(np.float32)
    near = [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(np.inf))]
    values = np.concatenate([finite.astype(np.float32), *near])
    values = np.concatenate([values, -values, np.array([np.inf, -np.inf], np.float32)])
    check(words.float_to_half, reference.cast(values, "f32", "f16").view(U16), values, every=97)
    nan = np.array([np.nan], np.float32)
    for run in (run_python, run_compiled):
        assert np.isnan(run(words.float_to_half, U16, nan).view(np.float16)).all()


@pytest.mark.parametrize("code", KINDS)
def test_fma_is_rounded_once(code: str) -> None:
    kind = KINDS[code]
    edges = np.array(list(product(REALS, repeat=3)), np.float64)
    if code == "f64":
        scale = {TINY: 5e-324, HUGE: 1.7976931348623157e308}
        edges = np.vectorize(lambda v: np.copysign(scale.get(abs(v), abs(v)), v))(edges)
    random = [
        np.concatenate([numbers(1500, code, seed, drawn) for drawn in ("bits", "weights")])
        for seed in (1, 2, 3)
    ]
    x, y, z = np.concatenate([edges.T.astype(kind), np.array(random)], axis=1)
    with np.errstate(all="ignore"):
        # Products that the addend cancels except for their low digits.
        few = slice(-1500, None)
        x, y, z = np.append(x, x[few]), np.append(y, y[few]), np.append(z, -x[few] * y[few])
        exact = reference._fma32 if code == "f32" else reference._fma64
        wide = [side.astype(np.float64) for side in (x, y, z)]
        want = np.array([exact(w, d[None], a[None])[0] for w, d, a in zip(*wide, strict=True)])
        check(words.fma, want.astype(kind), x, y, z)


def test_float_to_bf16_rounds_to_nearest() -> None:
    generator = np.random.default_rng(5)
    bits = generator.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000
    floats = np.concatenate((bits, ties, ties - 1, ties + 1, ties & 0xFFFF0000)).view(np.float32)
    found = run_compiled(words.float_to_bf16, np.uint16, floats)
    nan = np.isnan(floats)
    assert (found[nan] == 0x7FFF).all()
    np.testing.assert_array_equal(found[~nan], reference.cast(floats[~nan], "f32", "bf16"))
    for x, want in zip(floats[::997], found[::997], strict=True):
        assert words.float_to_bf16(x) == want


def test_gpu_and_cpu_round_alike_with_the_same_random_bits() -> None:
    """For results of bfloat16 arithmetic; the GPU's NaN has all bits set and must stay a NaN."""
    generator = np.random.default_rng(6)
    bits = generator.integers(0, 1 << 32, 100_000, dtype=np.uint32)
    floats = bits.view(np.float32)
    noise = generator.integers(0, 1 << 32, len(bits), dtype=np.uint32)
    there = run_compiled(scalar.encode_bf16_of_bf16_random_gpu, np.uint16, floats, noise)
    here = run_compiled(scalar.encode_bf16_of_bf16_random, np.uint16, floats, noise)
    nan = np.isnan(floats)
    np.testing.assert_array_equal(there[~nan], here[~nan])
    canonical = np.full(100, 0x7FFFFFFF, np.uint32).view(np.float32)
    assert (
        run_compiled(scalar.encode_bf16_of_bf16_random_gpu, np.uint16, canonical, noise[:100])
        == 0x7FFF
    ).all()
