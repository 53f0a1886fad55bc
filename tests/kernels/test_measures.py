"""Measures taken while an average is updated."""

import numpy as np
import pytest

from fastema.kernels.table import BLOCK, DISTANCE, SQUARE, STILL

from ..support import reference
from ..support.arrays import assert_same, numbers
from ..support.tolerance import unit_roundoff
from .rows import Row, run

FORMATS = [
    *(("f32", "f32"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f64")),
    *(("bf16", "bf16"), ("bf16~", "bf16"), ("f16~", "f32")),
]
SIZES = [1, BLOCK - 1, BLOCK, 5 * BLOCK + 9, 40 * BLOCK + 1]


@pytest.mark.parametrize("layout", ["flat", "strided"])
@pytest.mark.parametrize(("dst", "src"), FORMATS)
def test_measures_of_an_update_are_sums_over_its_rows(dst: str, src: str, layout: str) -> None:
    code, weights = dst.strip("~"), [0.01, 0.5, 0.25, 0.125, 0.0625]
    before = [numbers(n, code, i) for i, n in enumerate(SIZES)]
    sources = [numbers(n, src, 50 + n) for n in SIZES]
    for a, x in zip(before, sources, strict=True):
        equal = np.arange(1.0, 1 + len(a[::3])) % 100 / 16  # these stand still
        a[::3], x[::3] = reference.encode(equal, code), reference.encode(equal, src)
    settings = {"layout": layout, "seed": 11, "step": 12}
    after, plain = ([a.copy() for a in before] for _ in range(2))
    measured, rows = (
        [
            Row(a, x, average=i, index=100 * i, key=i)
            for i, (a, x) in enumerate(zip(averages, sources, strict=True))
        ]
        for averages in (after, plain)
    )
    results = run("lerp_measured", (dst, src), measured, weights, **settings)
    run("lerp", (dst, src), rows, weights, **settings)
    # Terms are rounded in the dtype of the arithmetic and added in blocks of 64.
    slack = (BLOCK + 4) * unit_roundoff("f64" if "f64" in (dst, src) else "f32")
    for i, (old, new, x) in enumerate(zip(before, after, sources, strict=True)):
        assert_same(new, plain[i], code)
        value = reference.decode(new, code)
        distance = reference.decode(x, src) - value
        np.testing.assert_allclose(results[i, DISTANCE], np.square(distance).sum(), rtol=slack)
        np.testing.assert_allclose(results[i, SQUARE], np.square(value).sum(), rtol=slack)
        still = (value == reference.decode(old, code)).sum()
        assert results[i, STILL] == still
        assert len(old) // 3 <= still
        assert still < len(old) or len(old) == 1


def test_two_halves_are_measured_as_one_float32() -> None:
    avg, x = numbers(1000, "f32", 1), numbers(1000, "bf16", 2)
    x[:100] = reference.cast(avg[:100], "f32", "bf16")
    avg[:100] = reference.decode(x[:100], "bf16")
    high, residual = reference.split(avg)
    results = run("lerp_measured", ("bf16+16", "bf16"), [Row(high, x, residual=residual)], [1e-6])
    want = run("lerp_measured", ("f32", "bf16"), [Row(avg, x)], [1e-6])
    np.testing.assert_allclose(results, want, rtol=1e-6)
    assert results[0, STILL] == want[0, STILL]
    assert 100 <= want[0, STILL] < 1000
