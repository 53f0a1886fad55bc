"""What all rules share: weights from decays, descriptions, classes of one's own."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
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
strides = st.integers(1, 50)


@dataclass(frozen=True)
class Steps(rules.Rule):
    """A rule as a user writes one, with parameters that hold others."""

    parts: tuple[tuple[int, rules.Rule], ...]
    last: rules.Rule
    names: tuple[str, ...] = ()

    def decay(self, n: int) -> float:
        for until, rule in self.parts:
            if n <= until:
                return rule.decay(n)
        return self.last.decay(n)


@dataclass(frozen=True)
class Given(rules.Rule):
    value: Any

    def decay(self, n: int) -> float:
        return self.value


class Bare(rules.Rule):
    def decay(self, n: int) -> float:
        return 0.5


@dataclass(frozen=True)
class Named(rules.Rule):
    rule: str

    def decay(self, n: int) -> float:
        return 0.5


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
    ("rule", "text"),
    [
        (Bare(), r"Bare.*dataclass.*to_dict"),
        (rules.debiased(Bare()), r"Bare.*dataclass"),
        (Steps((), Bare()), r"Bare.*dataclass"),
        (Named("x"), "Named.*rename"),
        (Given(abs), r"Given\.value is a builtins\.builtin_function_or_method.*checkpoint"),
        (Given((1, {"a": object()})), r"Given\.value\[1\]\['a'\] is a builtins\.object"),
        (Given(Decimal("0.9")), r"Given\.value is a decimal\.Decimal"),
    ],
)
def test_an_average_by_a_rule_that_no_checkpoint_can_hold_is_not_built(
    rule: rules.Rule, text: str
) -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(ArgumentError, match=text):
        fastema.EMA([numpy.ones(3)], rule)
    with pytest.raises(ArgumentError, match=text):
        rules.Schedule((rules.constant(), rule))


@pytest.mark.parametrize("decay", [abs, lambda n: 0.9, rules.warmup, rules.Constant, rules.Rule])
def test_a_function_for_a_decay_is_told_of_the_rules(decay: Any) -> None:
    numpy = pytest.importorskip("numpy")
    for build in (
        lambda: fastema.EMA([numpy.ones(3)], decay),
        lambda: fastema.EMA([numpy.ones(3)], (0.9, decay)),
        lambda: rules.constant(decay),
        lambda: rules.Schedule(decay),
    ):
        with pytest.raises(ArgumentError, match=r"fastema\.rules\.warmup\(0\.999\).*decay\(n\)"):
            build()


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


def test_an_unknown_rule_says_which_are_known() -> None:
    with pytest.raises(
        ArgumentError, match=r"'NoSuchRule'(.|\n)*Constant(.|\n)*Warmup(.|\n)*defined"
    ):
        rules.rule_from_dict({"rule": "NoSuchRule"})
