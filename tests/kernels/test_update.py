"""The update and the copy of every pair of formats, to the bit, on rows made by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from fastema.engine.registry import kernel
from fastema.kernels import table as abi
from fastema.kernels.table import BLOCK

from ..support import reference
from ..support.tolerance import exact_lerp, lerp_bound

# What rounds by random bits, or lies in two halves, has files of its own.
FLOATS = list(reference.FLOATS)
PAIRS = [pytest.param(dst, src, id=f"{dst}-{src}") for dst, src in product(FLOATS, FLOATS)]
# Strided loops run the same element: one pair of each kind suffices beyond the update.
SOME = [("f32", "bf16"), ("bf16", "f64"), ("f16", "f16"), ("f64", "f32")]
SOME_PAIRS = [pytest.param(*pair, id="-".join(pair)) for pair in SOME]
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]
STARTS = [0, 1, 2, 8]
WEIGHTS = [0.0009765625, 0.3, 1.0, 0.0, -0.7, 1.75]
RAW = {"raw1": "u8", "raw2": "u16", "raw4": "u32", "raw8": "i64"}


def specials(code: str) -> np.ndarray:
    """Numbers that are hard on arithmetic, as stored."""
    form = reference.FLOATS[code]
    unit = 2.0 ** (1 - form.digits)
    normal = 2.0**form.lowest
    values = [0.0, 1.0, 1 + unit, 2 - unit, form.smallest, 3 * form.smallest]
    values += [normal - form.smallest, normal, form.largest, form.largest / 3, np.inf]
    both = np.array([sign * value for value in values for sign in (1.0, -1.0)] + [np.nan])
    return reference.encode(both, code)


@pytest.mark.parametrize(("dst", "src"), PAIRS)
def test_lerp_on_rows_of_every_size(
    dst: str,
    src: str,
    numbers: Callable[..., np.ndarray],
    guarded: Callable[..., object],
    assert_same: Callable[..., None],
    run_rows: Callable[..., None],
) -> None:
    cases = list(product(SIZES, STARTS))
    # Where a row begins is not the same on both sides.
    sides = [
        (guarded(numbers(n, dst, 2 * n + s), s), guarded(numbers(n, src, 2 * n + s + 99), 8 - s))
        for n, s in cases
    ]
    want = [reference.lerp(to.array.copy(), of.array.copy(), 0.3, dst, src) for to, of in sides]
    run_rows("lerp", dst, src, "flat", [(to.array, of.array) for to, of in sides], 0.3)
    for (to, of), expected in zip(sides, want, strict=True):
        assert_same(to.array, expected, dst)
        to.assert_rest_untouched()
        of.assert_untouched()


@pytest.mark.parametrize(("dst", "src"), PAIRS)
def test_lerp_of_special_values(
    dst: str,
    src: str,
    numbers: Callable[..., np.ndarray],
    assert_same: Callable[..., None],
    run_rows: Callable[..., None],
) -> None:
    a, b = specials(dst), specials(src)
    random = [numbers(1500, code, 7, "bits") for code in (dst, src)]
    avg = np.concatenate([np.repeat(a, len(b)), random[0]])
    x = np.concatenate([np.tile(b, len(a)), random[1]])
    for w in WEIGHTS:
        want = reference.lerp(avg, x, w, dst, src)
        flat = avg.copy()
        run_rows("lerp", dst, src, "flat", [(flat, x)], w)
        assert_same(flat, want, dst)
        spaced = avg.copy()
        run_rows("lerp", dst, src, "strided", [(spaced, x)], w)
        assert_same(spaced, want, dst)


@pytest.mark.parametrize(("dst", "src"), PAIRS)
def test_lerp_is_within_the_bound(
    dst: str, src: str, numbers: Callable[..., np.ndarray], run_rows: Callable[..., None]
) -> None:
    avg, x = numbers(20_000, dst, 21), numbers(20_000, src, 22)
    for w in (1e-4, 0.1, 0.9):
        got = avg.copy()
        run_rows("lerp", dst, src, "flat", [(got, x)], w)
        error = np.abs(reference.decode(got, dst) - exact_lerp(avg, x, w, dst, src))
        np.testing.assert_array_less(error.astype(np.float64), lerp_bound(avg, x, w, dst, src))


@pytest.mark.parametrize(("dst", "src"), PAIRS)
def test_copy_rounds_once(
    dst: str,
    src: str,
    numbers: Callable[..., np.ndarray],
    guarded: Callable[..., object],
    assert_same: Callable[..., None],
    run_rows: Callable[..., None],
) -> None:
    x = np.concatenate([specials(src), numbers(3000, src, 3), numbers(20_000, src, 4, "bits")])
    if src in ("f16", "bf16"):
        x = np.concatenate([x, np.arange(1 << 16, dtype=np.uint16).view(x.dtype)])
    to = guarded(numbers(len(x), dst, 5), start=1)
    run_rows("copy", dst, src, "flat", [(to.array, x)])
    # Within one format the layout above takes the raw copy, so this one may quieten a NaN.
    assert_same(to.array, reference.encode(reference.decode(x, src), dst), dst)
    to.assert_rest_untouched()


@pytest.mark.parametrize(("dst", "src"), SOME_PAIRS)
@pytest.mark.parametrize("operation", ["lerp", "copy"])
@pytest.mark.parametrize(("to_step", "of_step"), [(1, 3), (3, 1), (2, 5), (-1, 2), (2, -3), (1, 0)])
def test_spaced_elements(
    dst: str,
    src: str,
    operation: str,
    to_step: int,
    of_step: int,
    numbers: Callable[..., np.ndarray],
    guarded: Callable[..., object],
    assert_same: Callable[..., None],
    run_rows: Callable[..., None],
) -> None:
    n = 131
    to = guarded(numbers(n, dst, 1), 1, (to_step,))
    of = guarded(numbers(n, src, 2), 2, (of_step,))
    avg, x = to.array.copy(), of.array.copy()
    run_rows(operation, dst, src, "strided", [(to.array, of.array, to_step, of_step)], 0.3)
    want = reference.lerp(avg, x, 0.3, dst, src)
    if operation == "copy":
        want = reference.encode(reference.decode(x, src), dst)
    assert_same(to.array.copy(), want, dst)
    to.assert_rest_untouched()
    of.assert_untouched()


@pytest.mark.parametrize("layout", ["flat", "strided"])
@pytest.mark.parametrize("raw", RAW)
def test_copy_moves_bits(
    raw: str,
    layout: str,
    numbers: Callable[..., np.ndarray],
    guarded: Callable[..., object],
    run_rows: Callable[..., None],
) -> None:
    step = 1 if layout == "flat" else 3
    for n in SIZES:
        to = guarded(numbers(n, RAW[raw], 1), 1, (step,))
        of = guarded(numbers(n, RAW[raw], 2), 0, (1,))
        run_rows("copy", raw, raw, layout, [(to.array, of.array, step, 1)])
        np.testing.assert_array_equal(to.array, of.array)
        to.assert_rest_untouched()
        of.assert_untouched()


def hundreds(avg: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Rows of a hundred elements each."""
    table = np.zeros((len(avg) // 100, abi.COLUMNS), np.int64)
    for i, cells in enumerate(table):
        cells[abi.DST], cells[abi.SRC] = avg.ctypes.data + 400 * i, x.ctypes.data + 400 * i
        cells[[abi.COUNT, abi.DST_STEP, abi.SRC_STEP]] = 100, 1, 1
    return table


def run_table(table: np.ndarray, weights: np.ndarray, control: np.ndarray) -> None:
    made = kernel("lerp", ("f32", "f32"), "flat")
    made(table.ctypes.data, len(table), weights.ctypes.data, control.ctypes.data)


def test_rows_are_taken_from_where_the_cursor_stands(
    numbers: Callable[..., np.ndarray],
) -> None:
    avg, x = numbers(300, "f32", 1), numbers(300, "f32", 2)
    table, before = hundreds(avg, x), avg.copy()
    control = np.zeros(abi.CONTROLS, np.int64)
    control[[abi.NEXT, abi.CLAIM]] = 1, 1
    run_table(table, np.array([0.5]), control)
    np.testing.assert_array_equal(avg[:100], before[:100])
    np.testing.assert_array_equal(avg[100:], before[100:] + 0.5 * (x - before)[100:])
    assert control[abi.NEXT] >= 3  # nothing is left for a thread that comes late


def test_averages_of_one_tensor_are_claimed_together_each_with_its_weight(
    numbers: Callable[..., np.ndarray], assert_same: Callable[..., None]
) -> None:
    avg, x = numbers(600, "f32", 1), numbers(600, "f32", 2)
    table, before = hundreds(avg, x), avg.copy()
    table[:, abi.AVERAGE] = 0, 1, 2, 0, 1, 2
    control = np.zeros(abi.CONTROLS, np.int64)
    control[[abi.NEXT, abi.CLAIM]] = 3, 3
    weights = np.array([0.5, 0.25, 1.0])
    run_table(table, weights, control)
    np.testing.assert_array_equal(avg[:300], before[:300])
    for first, weight in zip((300, 400, 500), weights, strict=True):
        row = slice(first, first + 100)
        want = reference.lerp(before[row], x[row], weight, "f32", "f32")
        assert_same(avg[row], want, "f32")
    assert control[abi.NEXT] >= 6
    assert control[abi.NEXT] % 3 == 0
