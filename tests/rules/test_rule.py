"""Rules: their formulas, what they refuse, and how they are described and rebuilt."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError

decays = st.floats(0.0, 1.0, exclude_max=True)
positive = st.floats(1e-3, 1e3)
plain_rules = st.one_of(
    st.builds(rules.constant, decays),
    st.builds(rules.warmup, decays),
    st.builds(rules.half_life, st.floats(1e-3, 1e9)),
    st.builds(rules.inverse_gamma, decays, positive, positive),
    st.builds(rules.cumulative_mean),
    st.builds(rules.Power, st.floats(0.0, 1e3)),
    st.builds(rules.window, st.integers(1, 100)),
)
every_rule = st.one_of(
    plain_rules,
    st.builds(rules.debiased, plain_rules),
    st.builds(rules.debiased, st.builds(rules.debiased, plain_rules)),
)
counts = st.integers(1, 300)


@dataclass(frozen=True)
class Given(rules.Rule):
    value: Any

    def decay(self, n: int) -> float:
        return self.value


@given(every_rule, counts)
def test_the_weight_of_a_step_is_what_the_decay_leaves(rule: rules.Rule, n: int) -> None:
    assert rule.weight(n) == pytest.approx(1.0 - rule.decay(n), rel=1e-13, abs=2e-16)


@given(every_rule)
def test_description_and_repr_rebuild_the_rule(rule: rules.Rule) -> None:
    rule.weight(7)
    plain = json.loads(json.dumps(rule.to_dict()))
    for other in (
        rules.rule_from_dict(plain),
        eval(repr(rule), vars(rules)),
        pickle.loads(pickle.dumps(rule)),
        copy.deepcopy(rule),
    ):
        assert other == rule
        assert hash(other) == hash(rule)
        assert repr(other) == repr(rule)
        assert other.weight(20, 4) == rule.weight(20, 4)
    assert isinstance(rule, rules.Rule)


@given(
    st.sampled_from([1e-12, 1e-9, 1e-6, 1e-3, 0.3, 0.9]),
    st.integers(1, 10**6),
)
def test_a_power_of_a_decay_near_one_keeps_its_digits(distance: float, every: int) -> None:
    decay = 1.0 - distance
    with localcontext() as context:
        context.prec = 50
        exact = float(1 - Decimal(decay) ** every)
    assert Given(decay).weight(every, every) == pytest.approx(exact, rel=1e-13, abs=0.0)


def test_mappings_of_rules_are_rebuilt() -> None:
    rule = Given({"first": rules.warmup(0.9), "numbers": (1, 2.5)})
    assert rules.rule_from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"rule": None},
        {"rule": "constant"},
        {"rule": "Rule"},
        {"rule": ["Constant"]},
        {"rule": "Constant"},
        {"rule": "Constant", "value": 1.0},
        {"rule": "Constant", "value": 0.5, "more": 1},
        {"rule": "InverseGamma", "limit": 0.9},
        {"rule": "Debiased"},
        {"rule": "Debiased", "inner": 0.9},
        {"rule": "Debiased", "inner": {"rule": "Constant"}},
        {"rule": "Debiased", "inner": {"rule": "Constant", "value": 0.9}, "_runs": {}},
        {"rule": "Power", "gamma": -1},
        {"rule": "Window", "size": 0},
        {"rule": "CumulativeMean", "n": 1},
        {"rule": "some.module.Rule"},
        "Constant",
        ["Constant"],
        [("rule", "Constant", 3)],
        None,
        5,
    ],
    ids=repr,
)
def test_descriptions_of_no_rule(plain: Any) -> None:
    with pytest.raises(ArgumentError):
        rules.rule_from_dict(plain)


updates = st.integers(1, 10**9)


@given(decays, updates)
@example(0.999, 8_989)
@example(0.999, 8_990)
def test_warmup_formula(decay: float, n: int) -> None:
    assert rules.warmup(decay).decay(n) == min(decay, (1 + n) / (10 + n))


@given(decays, positive, positive, updates)
def test_inverse_gamma_formula(decay: float, inv_gamma: float, power: float, n: int) -> None:
    rule = rules.inverse_gamma(decay, inv_gamma, power)
    grown = -math.expm1(-power * math.log1p((n - 1) / inv_gamma))
    assert rule.decay(n) == pytest.approx(min(decay, grown), abs=1e-12)
    assert rule.decay(1) == 0.0


@given(st.floats(1e-3, 1e6))
def test_half_life_halves(count: float) -> None:
    decay = rules.half_life(count).decay(1)
    if decay > 0.0:
        assert count * math.log2(decay) == pytest.approx(-1.0, rel=1e-6, abs=0.0)


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


@pytest.mark.parametrize("every", [1, 3, 64, 65, 1000, 40_000])
@pytest.mark.parametrize("fraction", [0.02, 0.05, 1.0])
def test_a_share_of_the_run_is_the_product_of_its_decays(fraction: float, every: int) -> None:
    rule = rules.half_life_fraction(fraction)
    for n in (every, 2 * every, 50 * every):
        steps = range(n - every + 1, n + 1)
        left = math.fsum(-math.log(2.0) / (fraction * step) for step in steps)
        assert rule.weight(n, every) == pytest.approx(-math.expm1(left), rel=1e-13)
    assert rule.decay(7) == pytest.approx(0.5 ** (1 / (7 * fraction)), rel=1e-15)


gammas = st.one_of(st.floats(0.0, 10.0), st.floats(10.0, 1e6))
widths = st.floats(1e-6, 1 / math.sqrt(12))


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


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=50), st.integers(1, 100))
def test_it_is_the_mean_of_what_it_saw(values: list[int], every: int) -> None:
    rule, average = rules.cumulative_mean(), Fraction(12345)
    for k, value in enumerate(values, 1):
        average += Fraction(rule.weight(k * every, every)) * (value - average)
    assert float(average) == pytest.approx(sum(values) / len(values), rel=1e-12, abs=1e-6)
