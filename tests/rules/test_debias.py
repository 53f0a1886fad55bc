"""Bias correction against the average that starts from zero."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError

decays = st.floats(0.0, 0.99999)
inner = st.one_of(
    st.builds(rules.constant, decays),
    st.builds(rules.warmup, decays),
    st.builds(rules.inverse_gamma, decays, st.floats(0.1, 100), st.floats(0.1, 3)),
    st.builds(rules.power, st.floats(0.01, 0.28)),
    st.builds(rules.cumulative_mean),
)


@dataclass(frozen=True)
class Slow(rules.Rule):
    """Takes in little for long, so that the correction matters for long."""

    scale: float

    def decay(self, n: int) -> float:
        return 1.0 - self.scale / (n + 10.0)


@dataclass(frozen=True)
class Wrong(rules.Rule):
    value: Any

    def decay(self, n: int) -> float:
        return self.value if n > 3 else 0.9


@given(inner, st.integers(1, 10), st.lists(st.integers(-100, 100), min_size=1, max_size=30))
def test_it_is_the_zero_initialised_average_over_what_it_has_seen(
    rule: rules.Rule, every: int, values: list[int]
) -> None:
    corrected = rules.debiased(rule)
    zero, seen = Fraction(0), Fraction(0)
    average = Fraction(10**6)  # what it began with leaves no trace
    for k, value in enumerate(values, 1):
        w = Fraction(rule.weight(k * every, every))
        zero += w * (value - zero)
        seen += w * (1 - seen)
        average += Fraction(corrected.weight(k * every, every)) * (value - average)
    assert float(average) == pytest.approx(float(zero / seen), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("scale", [0.3, 1e-9])
def test_a_growing_rule_against_exact_products(scale: float, every: int) -> None:
    rule = Slow(scale)
    corrected = rules.debiased(rule)
    with localcontext() as context:
        context.prec = 40
        left = Decimal(1)
        for k in range(1, 3001):
            w = rule.weight(k * every, every)
            left *= 1 - Decimal(w)
            exact = float(Decimal(w) / (1 - left))
            assert corrected.weight(k * every, every) == pytest.approx(exact, rel=1e-12, abs=0.0)


@pytest.mark.parametrize("value", [float("nan"), -0.5, 1.5, "x"], ids=repr)
def test_a_rule_that_gives_no_weight_is_named(value: Any) -> None:
    with pytest.raises((ArgumentError, TypeError), match=r"Wrong|unsupported|not supported"):
        rules.debiased(Wrong(value)).weight(10)
