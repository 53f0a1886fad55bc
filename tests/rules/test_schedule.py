"""When an average is updated and with what weight."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError
from fastema.rules import Schedule

decays = st.floats(0.0, 0.9999)
made = st.one_of(
    st.builds(rules.constant, decays),
    st.builds(rules.warmup, decays),
    st.builds(rules.inverse_gamma, decays),
)
every = st.integers(1, 50)
starts = st.integers(0, 200)
steps = st.integers(1, 1000)
schedules = st.builds(Schedule, made, every, starts)


@given(schedules, steps)
def test_weight_lies_between_zero_and_one(schedule: Schedule, step: int) -> None:
    assert 0.0 <= schedule.weight(step) <= 1.0


@given(made, steps)
def test_without_options_it_is_the_rule(rule: rules.Rule, step: int) -> None:
    assert Schedule(rule).weight(step) == 1.0 - rule.decay(step)
    assert Schedule(rule).decay(step) == rule.decay(step)
    assert not Schedule(rule).follows(step)
    assert not Schedule(rule).follows(0)


@given(schedules, steps)
def test_memory_is_touched_at_every_kth_step_from_the_start(schedule: Schedule, step: int) -> None:
    begun = step >= schedule.start_after
    due = (step - schedule.start_after) % schedule.update_every == 0
    copies = step == schedule.start_after > 0
    if not (begun and due):
        assert schedule.weight(step) == 0.0
    elif copies:
        assert schedule.weight(step) == 1.0
    else:
        m = step - schedule.start_after
        expected = 1.0 - schedule.rule.decay(m) ** schedule.update_every
        assert schedule.weight(step) == expected


@given(schedules, st.integers(0, 1000))
def test_until_the_start_it_follows(schedule: Schedule, step: int) -> None:
    assert schedule.follows(step) == (step < schedule.start_after)
    if schedule.follows(step) and step:
        assert schedule.weight(step) == 0.0
        assert schedule.decay(step) == 0.0


@given(schedules, steps)
def test_a_start_shifts_the_rule(schedule: Schedule, step: int) -> None:
    plain = Schedule(schedule.rule, schedule.update_every)
    shifted = step + schedule.start_after
    assert schedule.weight(shifted) == plain.weight(step)
    assert schedule.decay(shifted) == plain.decay(step)


def remaining(schedule: Schedule, step: int) -> Fraction:
    """Weight of the first value after so many steps."""
    left = Fraction(1)
    for n in range(1, step + 1):
        left *= 1 - Fraction(schedule.weight(n))
    return left


@given(st.floats(0.5, 0.9999), st.integers(1, 10), st.integers(1, 20))
def test_the_horizon_does_not_depend_on_how_often_memory_is_touched(
    decay: float, k: int, times: int
) -> None:
    often, seldom = Schedule(rules.constant(decay)), Schedule(rules.constant(decay), k)
    one, other = remaining(often, k * times), remaining(seldom, k * times)
    assert float(one) == pytest.approx(float(other), rel=1e-9)
    assert float(one) == pytest.approx(decay ** (k * times), rel=1e-9)


@given(schedules)
def test_description_and_repr_rebuild_it(schedule: Schedule) -> None:
    plain = json.loads(json.dumps(schedule.to_dict()))
    assert Schedule.from_dict(plain) == schedule
    assert eval(repr(schedule), vars(rules)) == schedule


def test_description_holds_plain_values() -> None:
    assert Schedule(rules.warmup(0.99), 3, 7).to_dict() == {
        "rule": {"rule": "Warmup", "limit": 0.99},
        "update_every": 3,
        "start_after": 7,
    }


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, math.nan, None, "2", True], ids=repr)
def test_update_every_that_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ArgumentError, match="update_every"):
        Schedule(rules.constant(), value)


@pytest.mark.parametrize("value", [-1, 0.0, 1.5, None, "2", False], ids=repr)
def test_start_after_that_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ArgumentError, match="start_after"):
        Schedule(rules.constant(), 1, value)


@pytest.mark.parametrize("rule", [0.9, None, "constant", object()], ids=str)
def test_what_is_no_rule(rule: Any) -> None:
    with pytest.raises(ArgumentError, match="rule"):
        Schedule(rule)


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"rule": {"rule": "Constant", "value": 0.5}},
        {"rule": {"rule": "Constant", "value": 0.5}, "update_every": 0, "start_after": 0},
        {"rule": {"rule": "Constant", "value": 0.5}, "update_every": 1, "start_after": -1},
        {"rule": {"rule": "?"}, "update_every": 1, "start_after": 0},
        {"rule": None, "update_every": 1, "start_after": 0},
        {"rule": "Constant", "update_every": 1, "start_after": 0},
    ],
    ids=repr,
)
def test_descriptions_of_no_schedule(plain: Any) -> None:
    with pytest.raises(ArgumentError):
        Schedule.from_dict(plain)
