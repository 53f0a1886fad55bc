"""Rules, and decays in other units: formulas, errors, bias correction, descriptions."""

import copy
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError
from fastema.rules import units

decays = st.floats(0.0, 1.0, exclude_max=True)
positive = st.floats(1e-3, 1e3)
plain_rules = st.one_of(
    st.builds(rules.constant, decays),
    st.builds(rules.warmup, decays, st.floats(1.0, 1e6)),
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
updates = st.integers(1, 10**9)


@dataclass(frozen=True)
class FixedDecay(rules.Rule):
    value: Any

    def decay(self, n: int) -> float:
        return self.value


@given(every_rule, st.integers(1, 300))
def test_the_weight_of_a_step_is_one_minus_its_decay(rule: rules.Rule, n: int) -> None:
    assert rule.weight(n) == pytest.approx(1.0 - rule.decay(n), rel=1e-13, abs=2e-16)


@given(st.sampled_from([1e-12, 1e-9, 1e-6, 1e-3, 0.3, 0.9]), st.integers(1, 10**6))
def test_a_weight_over_many_steps_keeps_its_digits(distance: float, every: int) -> None:
    decay = 1.0 - distance
    with localcontext() as context:
        context.prec = 50
        exact = float(1 - Decimal(decay) ** every)
    assert FixedDecay(decay).weight(every, every) == pytest.approx(exact, rel=1e-13, abs=0.0)


@given(decays, updates, st.sampled_from([1, 10, 25.5, 1000]))
@example(0.999, 8_989, 10)
@example(0.999, 8_990, 10)
def test_warmup_formula(decay: float, n: int, offset: float) -> None:
    assert rules.warmup(decay, offset).decay(n) == min(decay, (1 + n) / (offset + n))
    assert rules.warmup(decay) == rules.warmup(decay, 10)


@pytest.mark.parametrize("offset", [0.5, -1, math.nan, math.inf, "10"])
def test_warmup_offset_below_one_is_refused(offset: Any) -> None:
    with pytest.raises(ArgumentError, match=r"offset=.*at least 1"):
        rules.warmup(0.9, offset)


@given(decays, positive, positive, updates)
def test_inverse_gamma_formula(decay: float, inv_gamma: float, power: float, n: int) -> None:
    rule = rules.inverse_gamma(decay, inv_gamma, power)
    grown = -math.expm1(-power * math.log1p((n - 1) / inv_gamma))
    assert rule.decay(n) == pytest.approx(min(decay, grown), abs=1e-12)
    assert rule.decay(1) == 0.0


@given(st.floats(1.0, 1e9))
def test_decay_to_the_power_of_its_half_life_is_one_half(length: float) -> None:
    # The closer a decay is to 1, the fewer digits it has left.
    slack = 1e-15 * length + 1e-12
    decay = units.decay_of_half_life(length)
    assert length * math.log(decay) == pytest.approx(-math.log(2), rel=slack, abs=0.0)
    assert decay == rules.half_life(length).decay(1)


@pytest.mark.parametrize("every", [1, 3, 64, 65, 1000, 40_000])
@pytest.mark.parametrize("fraction", [0.02, 0.05, 1.0])
def test_half_life_fraction_is_the_product_of_its_decays(fraction: float, every: int) -> None:
    rule = rules.half_life_fraction(fraction)
    for n in (every, 2 * every, 50 * every):
        steps = range(n - every + 1, n + 1)
        left = math.fsum(-math.log(2.0) / (fraction * step) for step in steps)
        assert rule.weight(n, every) == pytest.approx(-math.expm1(left), rel=1e-13)
    assert rule.decay(7) == pytest.approx(0.5 ** (1 / (7 * fraction)), rel=1e-15)


@given(updates, st.sampled_from([1, 2, 100]), st.integers(0, 40))
def test_power_weights_keep_their_digits(updates: int, every: int, gamma: int) -> None:
    with localcontext() as context:
        context.prec = 60
        exact = float(1 - (1 - Decimal(1) / Decimal(updates)) ** (gamma + 1))
    found = rules.Power(gamma).weight(updates * every, every)
    assert found == pytest.approx(exact, rel=1e-13, abs=0.0)


@given(st.one_of(st.floats(0.0, 10.0), st.floats(10.0, 1e6)), st.integers(1, 10**6))
def test_power_formula(gamma: float, n: int) -> None:
    rule = rules.Power(gamma)
    assert rule.decay(n) == pytest.approx((1 - 1 / n) ** (gamma + 1), abs=1e-15)
    assert rule.weight(n) == pytest.approx(1 - rule.decay(n), rel=1e-9, abs=1e-10)


@given(st.floats(1e-6, 1 / math.sqrt(12)))
def test_sigma_rel_survives_a_round_trip(width: float) -> None:
    gamma = rules.gamma_of(width)
    assert gamma >= 0.0
    assert rules.sigma_rel_of(gamma) == pytest.approx(width, rel=1e-14, abs=0.0)
    assert rules.power(width).sigma_rel == pytest.approx(width, rel=1e-14, abs=0.0)


@given(st.integers(1, 12), st.integers(1, 60), st.integers(1, 20))
def test_slots_of_a_window_hold_the_last_values(size: int, updates: int, every: int) -> None:
    rule, ring = rules.window(size), {}
    for k in range(1, updates + 1):
        n = k * every
        ring[rule.slot(n, every)] = k
        kept = list(range(max(k - size, 0) + 1, k + 1))
        assert sorted(ring.values()) == kept
        assert set(ring) == set(range(rule.filled(n, every)))
        assert rule.weight(n, every) == 1 / len(kept)


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=50), st.integers(1, 100))
def test_a_cumulative_mean_equals_the_mean_of_its_values(values: list[int], every: int) -> None:
    rule, average = rules.cumulative_mean(), Fraction(12345)
    for k, value in enumerate(values, 1):
        average += Fraction(rule.weight(k * every, every)) * (value - average)
    assert float(average) == pytest.approx(sum(values) / len(values), rel=1e-12, abs=1e-6)


most = st.floats(0.0, 0.99999)


@given(
    st.one_of(
        st.builds(rules.constant, most),
        st.builds(rules.warmup, most),
        st.builds(rules.inverse_gamma, most, st.floats(0.1, 100), st.floats(0.1, 3)),
        st.builds(rules.power, st.floats(0.01, 0.28)),
        st.builds(rules.cumulative_mean),
    ),
    st.integers(1, 10),
    st.lists(st.integers(-100, 100), min_size=1, max_size=30),
)
def test_debiased_is_the_zero_initialized_average_over_its_total_weight(
    rule: rules.Rule, every: int, values: list[int]
) -> None:
    corrected = rules.debiased(rule)
    zero, seen = Fraction(0), Fraction(0)
    average = Fraction(10**6)  # the initial value must not matter
    for k, value in enumerate(values, 1):
        w = Fraction(rule.weight(k * every, every))
        zero += w * (value - zero)
        seen += w * (1 - seen)
        average += Fraction(corrected.weight(k * every, every)) * (value - average)
    assert float(average) == pytest.approx(float(zero / seen), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("step", [255, 256, 300, 511, 600])
def test_a_debiased_rule_asked_for_an_earlier_step_gives_what_it_gave_then(step: int) -> None:
    rule, asked_later = (rules.debiased(FixedDecay(0.999)) for _ in range(2))
    asked_later.log_decay(900)
    assert asked_later.log_decay(step) == rule.log_decay(step) < 0


@pytest.mark.parametrize("value", [float("nan"), -0.5, 1.5], ids=repr)
def test_a_debiased_rule_with_an_invalid_weight_is_named(value: float) -> None:
    with pytest.raises(ArgumentError, match="FixedDecay"):
        rules.debiased(FixedDecay(value)).weight(10)


@given(every_rule)
@example(FixedDecay({"first": rules.warmup(0.9), "numbers": (1, 2.5)}))
def test_description_and_copies_rebuild_the_rule(rule: rules.Rule) -> None:
    copies = [rules.rule_from_dict(json.loads(json.dumps(rule.to_dict()))), copy.deepcopy(rule)]
    if not isinstance(rule, FixedDecay):
        rule.weight(7)
        copies += [eval(repr(rule), vars(rules)), pickle.loads(pickle.dumps(rule))]
        assert {hash(other) for other in copies} == {hash(rule)}
        assert {other.weight(20, 4) for other in copies} == {rule.weight(20, 4)}
    assert all(other == rule and repr(other) == repr(rule) for other in copies)


@pytest.mark.parametrize(
    "plain",
    [
        *({}, {"rule": None}, {"rule": "constant"}, {"rule": "Rule"}, {"rule": ["Constant"]}),
        *({"rule": "Constant", "value": 1.0}, {"rule": "Constant", "value": 0.5, "more": 1}),
        *({"rule": "Constant"}, {"rule": "InverseGamma", "limit": 0.9}, {"rule": "Debiased"}),
        {"rule": "Debiased", "inner": 0.9},
        {"rule": "Debiased", "inner": {"rule": "Constant"}},
        {"rule": "Debiased", "inner": {"rule": "Constant", "value": 0.9}, "_runs": {}},
        *({"rule": "Power", "gamma": -1}, {"rule": "Window", "size": 0}),
        *({"rule": "some.module.Rule"}, "Constant", [("rule", "Constant", 3)], None),
    ],
    ids=repr,
)
def test_invalid_descriptions_are_refused(plain: Any) -> None:
    with pytest.raises(ArgumentError):
        rules.rule_from_dict(plain)


NOT_NUMBERS: list[Any] = [-1, math.nan, math.inf, None, "x", True]
NOT_DECAYS: list[Any] = [1.0, 1, -1e-9, 2.0, -math.inf, [0.5], 1j]

# Functions of one value, values that they refuse besides NOT_NUMBERS, and the message.
REFUSED: dict[str, tuple[list[Callable[[Any], object]], list[Any], str]] = {
    "decay": ([rules.constant, rules.warmup, rules.inverse_gamma], NOT_DECAYS, r"\[0, 1\)"),
    "minimum": (
        [lambda value: rules.inverse_gamma(0.9, minimum=value)],
        [*NOT_DECAYS, 0.95],  # above the limit
        "minimum",
    ),
    "length": ([rules.half_life], [0, 0.0, [1]], "above 0"),
    "inv_gamma": ([partial(rules.inverse_gamma, 0.9)], [0, 0.0, [1]], r"inv_gamma.*above 0"),
    "power": ([partial(rules.inverse_gamma, 0.9, 1.0)], [0, 0.0, [1]], r"power.*above 0"),
    "sigma_rel": ([rules.power, rules.gamma_of], [0, 0.2888, 0.5, 1, 5e-324], "sigma_rel"),
    "gamma": ([rules.Power, rules.sigma_rel_of], [-1e-9, False], "gamma"),
    "window": ([rules.window], [0, 1.0, 2.5, "2"], "window"),
    "window in units": ([units.decay_of_window], [0], r"window.*above 0"),
    "half-life in units": ([units.decay_of_half_life], [0], r"half_life.*above 0"),
    "factor": ([partial(units.rescaled, 0.9)], [0], r"factor.*above 0"),
    "unit": (
        [
            *(partial(units.effective_window, 0.9), partial(units.half_life_of_decay, 0.9)),
            *(partial(units.decay_of_window, 10), partial(units.decay_of_half_life, 10)),
        ],
        [0],
        r"per_step.*above 0",
    ),
    "window for decay 1": ([units.decay_of_window], [1e18], "window"),
    "half-life for decay 1": ([units.decay_of_half_life], [1e18], "half_life"),
    "factor for decay 1": ([partial(units.rescaled, 0.9)], [1e-18], "factor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_out_of_range_are_refused_by_name(name: str) -> None:
    calls, values, words = REFUSED[name]
    for call in calls:
        for value in [*NOT_NUMBERS, *values]:
            with pytest.raises(ArgumentError, match=words):
                call(value)
