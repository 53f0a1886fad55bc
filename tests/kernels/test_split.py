"""A float32 average in two halves: the nearest bfloat16 and a residual."""

from itertools import product

import numpy as np
import pytest

from fastema.kernels.table import BLOCK

from ..support import reference
from ..support.arrays import assert_same, lay_out_guarded, numbers
from .rows import Row, run

SPLIT = "bf16+16"
SOURCES = ["f32", "bf16", "f16", "f64"]

Array = np.ndarray


def join(high: Array, residual: Array) -> Array:
    """Join halves to float32; the high one was rounded up if the residual's first bit is set."""
    wide, rest = high.astype(np.uint32) << np.uint32(16), residual.astype(np.uint32)
    nan = (high & 0x7FFF) > 0x7F80
    borrowed = np.where(nan, 0, rest >> np.uint32(15)).astype(np.uint32) << np.uint32(16)
    return (wide - borrowed + rest).view(np.float32)


@pytest.mark.parametrize("steps", [(1, 1), (2, 1), (1, 3), (-3, 2)])
@pytest.mark.parametrize("kind", ["weights", "bits"])
@pytest.mark.parametrize("src", SOURCES)
def test_split_updates_equal_float32_updates(src: str, kind: str, steps: tuple[int, int]) -> None:
    layout = "flat" if steps == (1, 1) else "strided"
    sizes = [0, 1, BLOCK - 1, BLOCK + 1, 3 * BLOCK + 7]
    for n, w in product(sizes, (1e-3, 0.3, 1.0, 0.0)):
        avg, x = numbers(n, "f32", n, kind), numbers(n, src, n + 1, kind)
        halves = [lay_out_guarded(half, n % 3, steps[:1]) for half in reference.split(avg)]
        high, residual = (one.array for one in halves)
        of = lay_out_guarded(x, 5, steps[1:])
        row = Row(high, of.array, *steps, residual=residual)
        run("lerp", (SPLIT, src), [row], [w], layout=layout)
        want = reference.lerp(avg, x, w, "f32", src)
        assert_same(join(high, residual), want, "f32")
        assert_same(high, reference.split(want)[0], "bf16")
        for side in halves:
            side.assert_rest_untouched()
        of.assert_untouched()


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_swapping_split_averages_with_float32_weights_loses_no_bit(low: int) -> None:
    """Every high half of a float32, all kinds of NaN included, on either side."""
    weights = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)) | np.uint32(low)
    start = numbers(weights.size, "f32", 2, "bits")
    high, residual = reference.split(start)
    before, halves = weights.copy(), (high.copy(), residual.copy())
    rows = [Row(high, weights, residual=residual)]
    run("swap", (SPLIT, "raw4"), rows)
    assert_same(weights.view(np.float32), start, "f32")
    plain = ~np.isnan(before.view(np.float32))
    assert_same(join(high, residual)[plain], before.view(np.float32)[plain], "f32")
    run("swap", (SPLIT, "raw4"), rows)
    np.testing.assert_array_equal(weights, before)
    finite = ~np.isnan(start)
    np.testing.assert_array_equal([high[finite], residual[finite]], [h[finite] for h in halves])
    assert_same(join(high, residual), start, "f32")
