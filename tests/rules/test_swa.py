"""The cumulative mean."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema import rules


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=50), st.integers(1, 100))
def test_it_is_the_mean_of_what_it_saw(values: list[int], every: int) -> None:
    rule, average = rules.cumulative_mean(), Fraction(12345)
    for k, value in enumerate(values, 1):
        average += Fraction(rule.weight(k * every, every)) * (value - average)
    assert float(average) == pytest.approx(sum(values) / len(values), rel=1e-12, abs=1e-6)
