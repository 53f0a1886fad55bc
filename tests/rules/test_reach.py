"""How far back averages reach, compared with the shares of all their values."""

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
plain = st.one_of(
    st.builds(rules.constant, decays),
    st.builds(rules.warmup, decays),
    st.builds(rules.inverse_gamma, decays, st.floats(0.1, 100), st.floats(0.1, 3)),
    st.builds(rules.Power, st.floats(0.0, 100.0)),
    st.builds(rules.cumulative_mean),
)


@dataclass(frozen=True)
class Wave(rules.Rule):
    """A rule without a closed form; with height 0 and top 1, it takes in nothing."""

    height: float = 0.009
    top: float = 0.99

    def decay(self, n: int) -> float:
        return self.top + self.height * math.sin(n)


def assert_equals_definition(rule: rules.Rule, n: int, every: int) -> None:
    """Compare with the definition: the shares of each value and of the initial average."""
    shares, ages, left = [], [], 1.0
    for step in range(n - n % every, 0, -every):
        w = rule.weight(step, every)
        shares.append(left * w)
        ages.append(n - step)
        left *= 1.0 - w
    shares.append(left)
    ages.append(n)
    mean = math.fsum(s * a for s, a in zip(shares, ages, strict=True))
    square = math.fsum(s * (a - mean) ** 2 for s, a in zip(shares, ages, strict=True))
    found = effective_steps(rule, n, every)
    assert found.mean_age == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert found.std_age == pytest.approx(math.sqrt(square), rel=1e-9, abs=1e-6)
    assert found.initial_share == pytest.approx(left, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(st.one_of(plain, st.builds(rules.debiased, plain)), st.integers(1, 1500), st.integers(1, 30))
def test_effective_steps_equal_the_definition(rule: rules.Rule, n: int, every: int) -> None:
    if n < every:
        assert effective_steps(rule, n, every) == Reach(n, 0.0, 1.0)
    else:
        assert_equals_definition(rule, n, every)


LONG = [
    *(Wave(), Wave(0.0, 1.0), rules.constant(0.9999), rules.warmup(0.9999)),
    *(rules.debiased(rules.constant(0.99999)), rules.debiased(Wave()), rules.cumulative_mean()),
    *(rules.power(0.28), rules.power(0.2), rules.power(0.02)),
    *(rules.Power(0.0), rules.Power(1.0), rules.Power(60.5)),
]


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("rule", LONG, ids=repr)
def test_effective_steps_of_long_runs_equal_the_definition(rule: rules.Rule, every: int) -> None:
    assert_equals_definition(rule, 20_003, every)


@pytest.mark.parametrize("every", [1, 7])
def test_older_updates_of_equal_weight_are_merged_exactly(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastema.rules.reach._EXACT", 256)
    assert_equals_definition(Wave(0.0, 0.9998), 20_003, every)


def test_invalid_steps_and_rules_are_refused() -> None:
    odd: Any
    for odd in (-1, 1.5, None, True):
        with pytest.raises(ArgumentError, match=r"^n="):
            effective_steps(rules.constant(), odd)
    for odd in (0, -1, 1.5, None, True):
        with pytest.raises(ArgumentError, match="every"):
            effective_steps(rules.constant(), 10, odd)
    odd = 0.9
    with pytest.raises(ArgumentError, match="rule"):
        effective_steps(odd, 10)
