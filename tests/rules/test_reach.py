"""How far back averages look, against the shares of all their values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError
from fastema.rules import Reach, effective_steps

decays = st.floats(0.0, 0.9999)
made = st.one_of(
    st.builds(rules.constant, decays),
    st.builds(rules.warmup, decays),
    st.builds(rules.inverse_gamma, decays, st.floats(0.1, 100), st.floats(0.1, 3)),
    st.builds(rules.Power, st.floats(0.0, 100.0)),
    st.builds(rules.cumulative_mean),
)
anything = st.one_of(made, st.builds(rules.debiased, made))


@dataclass(frozen=True)
class Wave(rules.Rule):
    """No rule that anything is known about."""

    def decay(self, n: int) -> float:
        return 0.99 + 0.009 * math.sin(n)


@dataclass(frozen=True)
class Still(rules.Rule):
    def decay(self, n: int) -> float:
        return 1.0


def by_shares(rule: rules.Rule, n: int, every: int) -> Reach:
    """From the share of each value and of the beginning: the definition."""
    shares, ages, left = [], [], 1.0
    last = n - n % every
    for step in range(last, 0, -every):
        w = rule.weight(step, every)
        shares.append(left * w)
        ages.append(n - step)
        left *= 1.0 - w
    shares.append(left)
    ages.append(n)
    mean = math.fsum(s * a for s, a in zip(shares, ages, strict=True))
    square = math.fsum(s * (a - mean) ** 2 for s, a in zip(shares, ages, strict=True))
    return Reach(mean, math.sqrt(square), left)


def assert_near(found: Reach, expected: Reach, rel: float = 1e-9) -> None:
    assert found.mean_age == pytest.approx(expected.mean_age, rel=rel, abs=1e-9)
    assert found.std_age == pytest.approx(expected.std_age, rel=rel, abs=1e-6)
    assert found.initial_share == pytest.approx(expected.initial_share, rel=rel, abs=1e-12)


@settings(deadline=None)
@given(anything, st.integers(1, 1500), st.integers(1, 30))
def test_against_all_shares(rule: rules.Rule, n: int, every: int) -> None:
    if n < every:
        assert effective_steps(rule, n, every) == Reach(n, 0.0, 1.0)
    else:
        assert_near(effective_steps(rule, n, every), by_shares(rule, n, every))


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize(
    "rule",
    [
        Wave(),
        rules.constant(0.9999),
        rules.debiased(rules.constant(0.99999)),
        rules.debiased(Wave()),
        rules.power(0.28),
        rules.power(0.2),
        rules.power(0.02),
        rules.Power(0.0),
        rules.Power(1.0),
        rules.Power(60.5),
        rules.cumulative_mean(),
        rules.warmup(0.9999),
        Still(),
    ],
    ids=repr,
)
def test_long_runs_against_all_shares(rule: rules.Rule, every: int) -> None:
    assert_near(effective_steps(rule, 20_003, every), by_shares(rule, 20_003, every))


@pytest.mark.parametrize("value", [-1, 1.5, None, True], ids=repr)
def test_what_is_no_step(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^n="):
        effective_steps(rules.constant(), value)
    with pytest.raises(ArgumentError, match="every"):
        effective_steps(rules.constant(), 10, value)
    with pytest.raises(ArgumentError, match="every"):
        effective_steps(rules.constant(), 10, 0)


def test_what_is_no_rule() -> None:
    with pytest.raises(ArgumentError, match="rule"):
        effective_steps(0.9, 10)  # type: ignore[arg-type]
