"""The swap of every pair of formats, and the exact one of a wide average with narrow weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from fastema.kernels.table import BLOCK

from ..support import reference

FLOATS = list(reference.FLOATS)
PAIRS = [pytest.param(dst, src, id=f"{dst}-{src}") for dst, src in product(FLOATS, FLOATS)]
RAW = {"raw1": "u8", "raw2": "u16", "raw4": "u32", "raw8": "i64"}
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]


@pytest.mark.parametrize(("dst", "src"), PAIRS)
def test_swap_rounds_each_side_to_the_other(
    dst: str,
    src: str,
    numbers: Callable[..., np.ndarray],
    guarded: Callable[..., object],
    assert_same: Callable[..., None],
    run_rows: Callable[..., None],
) -> None:
    for n, kind in [*((n, "weights") for n in SIZES), (20_000, "bits")]:
        to, of = guarded(numbers(n, dst, 1, kind), 1), guarded(numbers(n, src, 2, kind), 2)
        a, b = to.array.copy(), of.array.copy()
        run_rows("swap", dst, src, "flat", [(to.array, of.array)])
        assert_same(to.array, reference.encode(reference.decode(b, src), dst), dst)
        assert_same(of.array, reference.encode(reference.decode(a, dst), src), src)
        to.assert_rest_untouched()
        of.assert_rest_untouched()


@pytest.mark.parametrize(("dst", "src"), [("f64", "f16"), ("bf16", "f32")])
def test_swap_of_spaced_elements(
    dst: str,
    src: str,
    numbers: Callable[..., np.ndarray],
    guarded: Callable[..., object],
    assert_same: Callable[..., None],
    run_rows: Callable[..., None],
) -> None:
    to, of = guarded(numbers(77, dst, 1), 0, (3,)), guarded(numbers(77, src, 2), 1, (-2,))
    a, b = to.array.copy(), of.array.copy()
    run_rows("swap", dst, src, "strided", [(to.array, of.array, 3, -2)])
    want = reference.swap(a, b, dst, src)
    assert_same(to.array.copy(), want[0], dst)
    assert_same(of.array.copy(), want[1], src)
    to.assert_rest_untouched()
    of.assert_rest_untouched()


@pytest.mark.parametrize("layout", ["flat", "strided"])
@pytest.mark.parametrize("raw", RAW)
def test_swap_moves_bits(
    raw: str,
    layout: str,
    numbers: Callable[..., np.ndarray],
    guarded: Callable[..., object],
    run_rows: Callable[..., None],
) -> None:
    steps = (1, 1) if layout == "flat" else (2, 3)
    for n in SIZES:
        to = guarded(numbers(n, RAW[raw], 1), 1, steps[:1])
        of = guarded(numbers(n, RAW[raw], 2), 2, steps[1:])
        a, b = to.array.copy(), of.array.copy()
        run_rows("swap", raw, raw, layout, [(to.array, of.array, *steps)])
        np.testing.assert_array_equal(to.array, b)
        np.testing.assert_array_equal(of.array, a)
        to.assert_rest_untouched()
        of.assert_rest_untouched()


def comes_back(pattern: np.ndarray) -> np.ndarray:
    """A signalling NaN that would be an infinity in 16 bits, which no arithmetic makes, quiet."""
    size = pattern & np.uint32(0x7FFFFFFF)
    changed = (size > 0x7F800000) & (size < 0x7F810000)
    return np.where(changed, pattern | np.uint32(0x400000), pattern)


@pytest.mark.parametrize("layout", ["flat", "strided"])
@pytest.mark.parametrize("size", [1, BLOCK + 1, 30_000])
def test_park_and_unpark_lose_no_bit(
    size: int,
    layout: str,
    numbers: Callable[..., np.ndarray],
    guarded: Callable[..., object],
    run_rows: Callable[..., None],
) -> None:
    step = 1 if layout == "flat" else 2
    pattern = numbers(size, "u32", 1, "bits")
    pattern[::5] = (pattern[::5] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)  # ties
    pattern[1::5] = numbers(len(pattern[1::5]), "f32", 3).view(np.uint32)
    weight = numbers(size, "u16", 2, "bits")
    avg, model = guarded(pattern, 1, (step,)), guarded(weight, 2, (step,))
    rows = [(avg.array, model.array, step, step)]
    run_rows("park", "raw4", "raw2", layout, rows)
    values, nan = pattern.view(np.float32), np.isnan(pattern.view(np.float32))
    tie = ~nan & (pattern & 0xFFFF == 0x8000)
    nearest = reference.cast(values, "f32", "bf16")
    plain = ~nan & ~tie
    np.testing.assert_array_equal(model.array[plain], nearest[plain])
    np.testing.assert_array_equal(model.array[tie], (pattern[tie] >> 16) + 1)
    assert np.isnan(reference.decode(model.array[nan], "bf16")).all()
    run_rows("unpark", "raw4", "raw2", layout, rows)
    np.testing.assert_array_equal(model.array, weight)
    np.testing.assert_array_equal(avg.array, comes_back(pattern))
    avg.assert_rest_untouched()
    model.assert_rest_untouched()


@pytest.mark.parametrize("residual", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_high_half_of_an_average_is_parked_and_comes_back(
    residual: int, run_rows: Callable[..., None]
) -> None:
    pattern = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)) | np.uint32(residual)
    weight = np.arange(1 << 16, dtype=np.uint16)[::-1].copy()
    avg, model = pattern.copy(), weight.copy()
    run_rows("park", "raw4", "raw2", "flat", [(avg, model)])
    nan = pattern & np.uint32(0x7FFFFFFF) > 0x7F800000
    np.testing.assert_array_equal(model & 0x7FFF > 0x7F80, nan)
    np.testing.assert_array_equal(model[nan], comes_back(pattern)[nan] >> 16)
    run_rows("unpark", "raw4", "raw2", "flat", [(avg, model)])
    np.testing.assert_array_equal(avg, comes_back(pattern))
    np.testing.assert_array_equal(model, weight)
