"""A float32 average in two halves: the nearest bfloat16, and what completes it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from fastema.kernels.table import BLOCK

from ..support import reference
from .rows import Row, run

Make = Callable[..., np.ndarray]
Check = Callable[..., None]

SPLIT = "bf16+16"
SOURCES = ["f32", "bf16", "f16", "f64"]
SIZES = [0, 1, BLOCK - 1, BLOCK + 1, 3 * BLOCK + 7]


def joined(high: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """The float32: the high half was rounded up where the low half's first bit is set."""
    wide, rest = high.astype(np.uint32) << np.uint32(16), residual.astype(np.uint32)
    nan = (high & 0x7FFF) > 0x7F80
    borrowed = np.where(nan, 0, rest >> np.uint32(15)).astype(np.uint32) << np.uint32(16)
    return (wide - borrowed + rest).view(np.float32)


def test_joined_undoes_the_split(numbers: Make) -> None:
    values = np.concatenate([numbers(9000, "f32", 1, "bits"), numbers(9000, "f32", 1)])
    values = values[~np.isnan(values)]
    got = joined(*reference.split(values))
    np.testing.assert_array_equal(got.view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("kind", ["weights", "bits"])
@pytest.mark.parametrize("src", SOURCES)
def test_updates_are_those_of_a_float32(
    src: str, kind: str, numbers: Make, guarded: Callable[..., object], assert_same: Check
) -> None:
    for n, w in product(SIZES, (1e-3, 0.3, 1.0, 0.0)):
        avg, x = numbers(n, "f32", n, kind), numbers(n, src, n + 1, kind)
        high, residual = (guarded(half, start=n % 3) for half in reference.split(avg))
        of = guarded(x, start=5)
        run("lerp", (SPLIT, src), [Row(high.array, of.array, residual=residual.array)], [w])
        want = reference.lerp(avg, x, w, "f32", src)
        assert_same(joined(high.array, residual.array), want, "f32")
        assert_same(high.array.copy(), reference.split(want)[0], "bf16")
        for side in (high, residual):
            side.assert_rest_untouched()
        of.assert_untouched()


@pytest.mark.parametrize("src", SOURCES)
def test_a_long_run_is_that_of_a_float32(src: str, numbers: Make, bits: Make) -> None:
    n = 2 * BLOCK + 3
    avg = numbers(n, "f32", 1)
    high, residual = reference.split(avg)
    for step in range(300):
        x, w = numbers(n, src, 2 + step), 0.001 if step % 2 else 0.3
        run("lerp", (SPLIT, src), [Row(high, x, residual=residual)], [w])
        run("lerp", ("f32", src), [Row(avg, x)], [w])
    np.testing.assert_array_equal(bits(joined(high, residual)), bits(avg))
    np.testing.assert_array_equal([high, residual], reference.split(avg))


@pytest.mark.parametrize(("to_step", "of_step"), [(2, 1), (1, 3), (-3, 2)])
def test_the_low_half_lies_as_the_high_half_does(
    to_step: int, of_step: int, numbers: Make, guarded: Callable[..., object], assert_same: Check
) -> None:
    n = 131
    avg, x = numbers(n, "f32", 1), numbers(n, "f32", 2)
    high, residual = (guarded(half, 1, (to_step,)) for half in reference.split(avg))
    of = guarded(x, 2, (of_step,))
    row = Row(high.array, of.array, to_step, of_step, residual=residual.array)
    run("lerp", (SPLIT, "f32"), [row], [0.3], layout="strided")
    got = joined(high.array.copy(), residual.array.copy())
    assert_same(got, reference.lerp(avg, x, 0.3, "f32", "f32"), "f32")
    for side in (high, residual):
        side.assert_rest_untouched()


def test_every_kind_of_number_comes_back_to_the_bit(numbers: Make) -> None:
    ends = np.array([0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 1, 0x8000, 0x7FFF, 0, 0x7F800000])
    ties = np.arange(1 << 16) << 16 | 0x8000
    all_bits = np.concatenate([ends, ends | 0x80000000, ties]).astype(np.uint32)
    values = np.concatenate([all_bits.view(np.float32), numbers(30_000, "f32", 3, "bits")])
    high, residual = np.zeros((2, values.size), np.uint16)
    run("copy", (SPLIT, "f32"), [Row(high, values, residual=residual)])
    back = np.zeros(values.size, np.float32)
    run("cast_back", (SPLIT, "f32"), [Row(high, back, residual=residual)])
    nan = np.isnan(values)
    want = values.view(np.uint32)
    np.testing.assert_array_equal(back.view(np.uint32)[~nan], want[~nan])
    np.testing.assert_array_equal(back.view(np.uint32)[nan], want[nan] | 0x400000)
    expected = reference.split(values[~nan])
    np.testing.assert_array_equal([high[~nan], residual[~nan]], expected)


@pytest.mark.parametrize("src", SOURCES)
def test_to_weights_and_back(src: str, numbers: Make, assert_same: Check) -> None:
    avg, x = numbers(3000, "f32", 1, "bits"), numbers(3000, src, 2, "bits")
    high, residual = reference.split(avg)
    out = x.copy()
    run("cast_back", (SPLIT, src), [Row(high, out, residual=residual)])
    assert_same(out, reference.encode(reference.decode(avg, "f32"), src), src)
    run("copy", (SPLIT, src), [Row(high, x, residual=residual)])
    assert_same(joined(high, residual), reference.encode(reference.decode(x, src), "f32"), "f32")


def test_weights_of_float32_change_places_with_both_halves(
    numbers: Make, assert_same: Check
) -> None:
    avg, x = numbers(3000, "f32", 1, "bits"), numbers(3000, "f32", 2, "bits")
    high, residual = reference.split(avg)
    weights = x.copy()
    row = Row(high, weights.view(np.uint32), residual=residual)
    run("swap", (SPLIT, "raw4"), [row])
    assert_same(weights, avg, "f32")
    plain = ~np.isnan(x)
    assert_same(joined(high, residual)[plain], x[plain], "f32")
    run("swap", (SPLIT, "raw4"), [row])
    np.testing.assert_array_equal(weights.view(np.uint32), x.view(np.uint32))
    assert_same(joined(high, residual), avg, "f32")


@pytest.mark.parametrize("residual", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_no_bit_of_the_weights_is_lost_by_a_swap(residual: int) -> None:
    """Every high half of a float32, NaNs of all kinds among them."""
    bits = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)) | np.uint32(residual)
    high, rest = reference.split(np.linspace(-3, 3, bits.size, dtype=np.float32))
    weights, halves = bits.copy(), (high.copy(), rest.copy())
    row = Row(halves[0], weights, residual=halves[1])
    run("swap", (SPLIT, "raw4"), [row])
    np.testing.assert_array_equal(weights.view(np.float32), joined(high, rest))
    run("swap", (SPLIT, "raw4"), [row])
    np.testing.assert_array_equal(weights, bits)
    np.testing.assert_array_equal(halves, (high, rest))
