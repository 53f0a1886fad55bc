"""Batch values from running means and sums, against the batches that made them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema.errors import ArgumentError
from fastema.tracking.recover import from_means, from_totals

# Epochs of at least two batches: the count gets smaller from one to the next.
BATCHES = st.lists(st.tuples(st.floats(-100.0, 100.0), st.integers(1, 64)), min_size=2, max_size=30)


def sums(epoch: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of the batches; total and count so far after each."""
    values, counts = np.array(epoch, np.float64).T
    return values, np.cumsum(values * counts), np.cumsum(counts)


@given(st.lists(BATCHES, min_size=1, max_size=4))
def test_recovers_the_batches_of_all_epochs(epochs: list[list[tuple[float, int]]]) -> None:
    # The first batch of an epoch is as large as any, and smaller than two of them.
    epochs = [[(epoch[0][0], 1), *epoch[1:]] for epoch in epochs]
    values, totals, counts = (np.concatenate(one) for one in zip(*map(sums, epochs), strict=True))
    np.testing.assert_allclose(from_totals(totals, counts), values, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(from_means(totals / counts, counts), values, rtol=1e-10, atol=1e-9)


def test_the_last_batch_may_be_short() -> None:
    """Where the formula for batches of one size is wrong."""
    counts, values = np.array([32.0] * 9 + [5.0]), np.random.default_rng(4).normal(2.0, 1.0, 10)
    totals, seen = np.cumsum(values * counts), np.cumsum(counts)
    means = totals / seen
    np.testing.assert_allclose(from_means(means, seen), values, rtol=1e-12)
    assert abs(10 * means[-1] - 9 * means[-2] - values[-1]) > 0.1


@pytest.mark.parametrize("batches", [100, 10_000])
def test_float32_curves_are_within_the_documented_error(batches: int) -> None:
    draw = np.random.default_rng(batches)
    values = draw.uniform(0.5, 1.5, batches)
    counts = np.full(batches, 32.0)
    totals, seen = np.cumsum(values * counts), np.cumsum(counts)
    means = totals / seen
    rounded = from_means(means.astype(np.float32), seen)
    bound = 2.0**-24 * np.abs(means) * (2 * seen - 32.0) / 32.0
    assert (np.abs(rounded - values)[1:] <= 1.1 * bound[1:]).all()
    rounded = from_totals(totals.astype(np.float32), seen)
    assert (np.abs(rounded - values) <= 1.1 * 2.0**-24 * (2 * totals / 32.0)).all()
    assert np.abs(rounded - values).max() > 1e-7 * batches / 20  # not exact either


def test_a_batch_that_counted_nothing_has_no_value() -> None:
    got = from_totals([6.0, 6.0, 10.0], [2.0, 2.0, 4.0])
    np.testing.assert_array_equal(got, [3.0, np.nan, 2.0])
    # Before the first one Keras shows 0, others NaN.
    for empty in (0.0, np.nan):
        np.testing.assert_array_equal(from_means([empty, 3.0], [0.0, 2.0]), [np.nan, 3.0])


def test_a_mean_that_is_not_finite() -> None:
    got = from_means([1.0, np.nan, np.nan, 2.0], [1.0, 2.0, 3.0, 1.0])
    np.testing.assert_array_equal(got, [1.0, np.nan, np.nan, 2.0])


@pytest.mark.parametrize(
    ("values", "counts", "problem"),
    [
        ([1.0, 2.0], [1.0], r"shape \(2,\), counts of shape \(1,\)"),
        ([[1.0]], [[1.0]], r"shape \(1, 1\)"),
        ([1.0, 2.0], [1.0, -1.0], r"counts\[1\] is -1.0"),
        ([1.0], [np.nan], r"counts\[0\] is nan"),
        ([1.0], [np.inf], r"counts\[0\] is inf"),
        (["a"], [1.0], "expected numbers"),
    ],
)
def test_what_is_no_curve_is_refused(values: object, counts: object, problem: str) -> None:
    for function in (from_means, from_totals):
        with pytest.raises(ArgumentError, match=problem):
            function(values, counts)  # type: ignore[arg-type]
