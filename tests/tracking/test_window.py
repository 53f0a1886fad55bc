from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema.tracking.window import WindowSum

SIZES = (1, 2, 3, 10, 127, 128, 129, 300)  # from 128 on, sums from behind are NumPy's
FLOATS = st.floats(-1e12, 1e12, allow_subnormal=False)


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_those_of_the_window_rounded_once(size: int) -> None:
    rng = np.random.default_rng(size)
    x = (rng.normal(size=5 * size + 7) * 10.0 ** rng.integers(-9, 9, 5 * size + 7)).tolist()
    window = WindowSum(size)
    for i, value in enumerate(x):
        assert window.push(value) == pytest.approx(
            math.fsum(x[max(0, i + 1 - size) : i + 1]), rel=3e-16, abs=1e-22
        )
        assert window.count == min(i + 1, size)
        assert window.numbers().tolist() == x[i + 1 - window.count : i + 1]


@given(
    st.integers(1, 40),
    st.lists(FLOATS, max_size=60),
    st.lists(FLOATS, min_size=1, max_size=60),
)
def test_begins_where_another_one_was(size: int, before: list[float], after: list[float]) -> None:
    whole = WindowSum(size)
    for x in before:
        whole.push(x)
    part = WindowSum(size, np.array(before, np.float64))
    for x in after:
        assert part.push(x) == pytest.approx(whole.push(x), rel=1e-15, abs=1e-15)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan, 1e300])
def test_what_left_the_window_leaves_no_trace(size: int, odd: float) -> None:
    rng = np.random.default_rng(7)
    x = rng.uniform(0.1, 1.0, 3 * size + 5).tolist()
    for at in {0, size // 2, size - 1, size}:
        spoilt = x.copy()
        spoilt[at] = odd
        clean, window = WindowSum(size), WindowSum(size)
        sums = [(clean.push(a), window.push(b)) for a, b in zip(x, spoilt, strict=True)]
        for i, (expected, found) in enumerate(sums):
            if at <= i < at + size:
                assert found != expected
                assert math.isnan(found) == math.isnan(odd)
            else:
                assert found == expected, (at, i)


def test_an_interrupted_push_did_not_happen() -> None:
    class Interrupting(float):
        def __radd__(self, other: float) -> float:
            raise KeyboardInterrupt

    window, other = WindowSum(4), WindowSum(4)
    x = np.random.default_rng(1).normal(size=11).tolist()
    for value in x:
        with pytest.raises(KeyboardInterrupt):
            window.push(Interrupting(9.0))
        assert window.push(value) == other.push(value)
    assert all(a != b for a, b in pairwise(x))
