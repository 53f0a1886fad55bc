"""Power-function averages: the profile they really have, and the two names of its width."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError

gammas = st.one_of(st.floats(0.0, 10.0), st.floats(10.0, 1e6))
widths = st.floats(1e-6, 1 / math.sqrt(12))


def shares(rule: rules.Rule, updates: int, every: int) -> tuple[np.ndarray, float]:
    """Share of each update's value in the average after the last, and that of the beginning."""
    w = np.array([rule.weight(k * every, every) for k in range(1, updates + 1)])
    after = np.append(np.cumprod((1 - w)[::-1])[::-1][1:], 1.0)
    return w * after, float(np.prod(1 - w))


@given(st.integers(1, 10**9), st.sampled_from([1, 2, 100]), st.integers(0, 40))
def test_weights_keep_their_digits(updates: int, every: int, gamma: int) -> None:
    with localcontext() as context:
        context.prec = 60
        exact = float(1 - (1 - Decimal(1) / Decimal(updates)) ** (gamma + 1))
    assert rules.Power(gamma).weight(updates * every, every) == pytest.approx(
        exact, rel=1e-13, abs=0.0
    )


@given(gammas, st.integers(1, 10**6))
def test_decay_formula(gamma: float, n: int) -> None:
    rule = rules.Power(gamma)
    assert rule.decay(n) == pytest.approx((1 - 1 / n) ** (gamma + 1), abs=1e-15)
    assert rule.weight(n) == pytest.approx(1 - rule.decay(n), rel=1e-9, abs=1e-10)


@given(widths)
def test_round_trip_of_sigma_rel(width: float) -> None:
    gamma = rules.gamma_of(width)
    assert gamma >= 0.0
    assert rules.sigma_rel_of(gamma) == pytest.approx(width, rel=1e-14, abs=0.0)
    assert rules.power(width).sigma_rel == pytest.approx(width, rel=1e-14, abs=0.0)


@pytest.mark.parametrize(
    "value", [0, -0.1, 0.2888, 0.5, 1, math.nan, math.inf, 5e-324, None, "x", True], ids=repr
)
def test_what_is_no_sigma_rel(value: Any) -> None:
    for make in (rules.power, rules.gamma_of):
        with pytest.raises(ArgumentError, match="sigma_rel"):
            make(value)


@pytest.mark.parametrize("value", [-1e-9, -1, math.nan, math.inf, None, "x", False], ids=repr)
def test_what_is_no_gamma(value: Any) -> None:
    for make in (rules.Power, rules.sigma_rel_of):
        with pytest.raises(ArgumentError, match="gamma"):
            make(value)
