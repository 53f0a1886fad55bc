"""Power-function averages: the profile they really have, and the two names of its width."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
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


@given(st.floats(0.0, 50.0), st.integers(1, 200), st.integers(1, 100))
def test_a_share_is_the_integral_of_the_profile(gamma: float, updates: int, every: int) -> None:
    found, _ = shares(rules.Power(gamma), updates, every)
    edges = (np.arange(updates + 1) / updates) ** (gamma + 1)
    np.testing.assert_allclose(found, np.diff(edges), rtol=1e-9, atol=1e-14)


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


def test_the_first_update_copies() -> None:
    assert rules.power(0.05).decay(1) == 0.0
    assert [rules.power(0.05).weight(n, 10) for n in (1, 9, 10)] == [1.0, 1.0, 1.0]


@given(gammas)
def test_round_trip_of_gamma(gamma: float) -> None:
    back = rules.gamma_of(rules.sigma_rel_of(gamma))
    assert back == pytest.approx(gamma, rel=1e-12, abs=1e-13)


@given(widths)
def test_round_trip_of_sigma_rel(width: float) -> None:
    gamma = rules.gamma_of(width)
    assert gamma >= 0.0
    assert rules.sigma_rel_of(gamma) == pytest.approx(width, rel=1e-14, abs=0.0)
    assert rules.power(width).sigma_rel == pytest.approx(width, rel=1e-14, abs=0.0)


def test_the_width_is_that_of_the_density() -> None:
    for gamma in (0, 1, 2, 7, 17):
        # Moments of (gamma + 1) s**gamma on [0, 1].
        mean, square = Fraction(gamma + 1, gamma + 2), Fraction(gamma + 1, gamma + 3)
        assert rules.sigma_rel_of(gamma) == pytest.approx(
            math.sqrt(square - mean**2), rel=1e-15, abs=0.0
        )


def test_the_widest() -> None:
    for width in (1 / math.sqrt(12), math.sqrt(1 / 12), rules.sigma_rel_of(0)):
        assert rules.gamma_of(width) == pytest.approx(0.0, abs=1e-14)


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
