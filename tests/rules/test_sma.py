"""The windowed mean's bookkeeping, against a list."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError


@given(st.integers(1, 12), st.integers(1, 60), st.integers(1, 20))
def test_slots_hold_the_last_values(size: int, updates: int, every: int) -> None:
    rule, ring = rules.window(size), {}
    for k in range(1, updates + 1):
        n = k * every
        ring[rule.slot(n, every)] = k
        kept = list(range(max(k - size, 0) + 1, k + 1))
        assert sorted(ring.values()) == kept
        assert set(ring) == set(range(rule.filled(n, every)))
        assert rule.weight(n, every) == 1 / len(kept)


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, math.nan, None, "2", True], ids=repr)
def test_a_size_that_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ArgumentError, match="window"):
        rules.window(value)
