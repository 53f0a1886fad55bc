"""Decay schedules as pure functions: formulas, limits, monotony."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError

decays = st.floats(0.0, 1.0, exclude_max=True)
updates = st.integers(1, 10**9)
positive = st.floats(1e-3, 1e3)
anything = st.one_of(
    st.builds(rules.constant, decays),
    st.builds(rules.warmup, decays),
    st.builds(rules.half_life, st.floats(1e-3, 1e9)),
    st.builds(rules.inverse_gamma, decays, positive, positive),
)


@given(anything, updates)
def test_decay_lies_between_zero_and_one(rule: rules.Rule, n: int) -> None:
    assert 0.0 <= rule.decay(n) < 1.0
    assert type(rule.decay(n)) is float


@given(anything, updates, st.integers(1, 10**6))
def test_decay_never_falls(rule: rules.Rule, n: int, more: int) -> None:
    assert rule.decay(n) <= rule.decay(n + more)


@given(anything, updates)
def test_rules_are_pure(rule: rules.Rule, n: int) -> None:
    first = rule.decay(n)
    rule.decay(n + 1)
    assert rule.decay(n) == first


@given(decays, updates)
def test_constant(decay: float, n: int) -> None:
    assert rules.constant(decay).decay(n) == decay


@given(decays, updates)
@example(0.999, 8_989)
@example(0.999, 8_990)
def test_warmup_formula(decay: float, n: int) -> None:
    assert rules.warmup(decay).decay(n) == min(decay, (1 + n) / (10 + n))


def test_warmup_begins_and_ends_where_it_says() -> None:
    rule = rules.warmup(0.999)
    assert rule.decay(1) == 2 / 11
    assert rule.decay(8_989) < 0.999
    assert rule.decay(8_990) == 0.999


@given(decays, positive, positive, updates)
def test_inverse_gamma_formula(decay: float, inv_gamma: float, power: float, n: int) -> None:
    rule = rules.inverse_gamma(decay, inv_gamma, power)
    grown = -math.expm1(-power * math.log1p((n - 1) / inv_gamma))
    assert rule.decay(n) == pytest.approx(min(decay, grown), abs=1e-12)
    assert rule.decay(1) == 0.0


@given(decays, decays, updates)
def test_inverse_gamma_stays_above_its_minimum(one: float, other: float, n: int) -> None:
    low, high = sorted((one, other))
    rule = rules.inverse_gamma(high, minimum=low)
    assert low <= rule.decay(n) <= high


@given(st.integers(1, 10**6))
def test_inverse_gamma_with_power_one_is_the_running_mean(n: int) -> None:
    rule = rules.inverse_gamma(1 - 1e-12, power=1.0)
    assert 1 - rule.decay(n) == pytest.approx(1 / n, rel=1e-9, abs=0.0)


@pytest.mark.parametrize(("power", "n"), [(2 / 3, 31_623), (3 / 4, 10_000)])
def test_inverse_gamma_reaches_0_999_where_it_says(power: float, n: int) -> None:
    rule = rules.inverse_gamma(0.9999, power=power)
    # The formula lands on 0.999 up to its own rounding at the named update.
    assert rule.decay(n - 1) < 0.999
    assert rule.decay(n + 1) > 0.999


@given(st.floats(1e-3, 1e6))
def test_half_life_halves(count: float) -> None:
    decay = rules.half_life(count).decay(1)
    if decay > 0.0:
        assert count * math.log2(decay) == pytest.approx(-1.0, rel=1e-6, abs=0.0)


@given(st.integers(1, 100), st.integers(0, 100))
def test_half_life_in_a_sum_of_weights(count: int, more: int) -> None:
    decay = rules.half_life(count).decay(1)
    assert decay ** (more + count) == pytest.approx(decay**more / 2, rel=1e-9, abs=0.0)


def test_constant_in_closed_form() -> None:
    decay, values = Fraction(9, 10), [Fraction(k * k % 17 - 8) for k in range(20)]
    average = Fraction(5)
    for x in values:
        average += (1 - decay) * (x - average)
    n = len(values)
    closed = decay**n * 5 + (1 - decay) * sum(decay ** (n - k) * x for k, x in enumerate(values, 1))
    assert average == closed


NO_DECAYS: list[Any] = [
    1.0,
    1,
    True,
    -1e-9,
    2.0,
    math.nan,
    math.inf,
    -math.inf,
    None,
    "x",
    [0.5],
    1j,
]


@pytest.mark.parametrize("decay", NO_DECAYS, ids=repr)
def test_what_is_no_decay(decay: Any) -> None:
    for make in (rules.constant, rules.warmup, rules.inverse_gamma):
        with pytest.raises(ArgumentError, match=r"\[0, 1\)"):
            make(decay)
    with pytest.raises(ArgumentError, match="minimum"):
        rules.inverse_gamma(0.9, minimum=decay)


@pytest.mark.parametrize("value", [0, -1, 0.0, math.nan, math.inf, None, "x", True, [1]], ids=repr)
def test_what_is_not_positive(value: Any) -> None:
    with pytest.raises(ArgumentError, match="above 0"):
        rules.half_life(value)
    with pytest.raises(ArgumentError, match=r"inv_gamma.*above 0"):
        rules.inverse_gamma(0.9, inv_gamma=value)
    with pytest.raises(ArgumentError, match=r"power.*above 0"):
        rules.inverse_gamma(0.9, power=value)


def test_a_minimum_above_the_limit() -> None:
    with pytest.raises(ArgumentError, match="minimum"):
        rules.inverse_gamma(0.9, minimum=0.95)


def test_a_half_life_too_long_for_a_float() -> None:
    with pytest.raises(ArgumentError):
        rules.half_life(1e18)


def test_numbers_of_other_libraries() -> None:
    numpy = pytest.importorskip("numpy")
    assert rules.constant(numpy.float32(0.5)).to_dict() == {"rule": "Constant", "value": 0.5}
    assert type(rules.constant(numpy.float64(0.5)).decay(1)) is float


def test_rules_cannot_be_changed() -> None:
    for rule in (rules.constant(0.9), rules.warmup(0.9), rules.inverse_gamma(0.9)):
        with pytest.raises((AttributeError, TypeError)):
            rule.limit = 0.5
        with pytest.raises((AttributeError, TypeError)):
            rule.value = 0.5
