"""When averages are updated and with what weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
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
    st.builds(rules.power, st.floats(0.01, 0.28)),
    st.builds(rules.cumulative_mean),
    st.builds(rules.window, st.integers(1, 20)),
    st.builds(rules.debiased, st.builds(rules.warmup, decays)),
)
sets = st.lists(made, min_size=1, max_size=4).map(tuple)
every = st.integers(1, 50)
starts = st.integers(0, 200)
steps = st.integers(1, 1000)
schedules = st.builds(Schedule, sets, every, starts)


@dataclass(frozen=True)
class Given(rules.Rule):
    value: Any

    def decay(self, n: int) -> Any:
        return self.value

    def weight(self, n: int, every: int = 1) -> Any:
        return self.value


@given(made, steps)
def test_without_options_it_is_the_rule(rule: rules.Rule, step: int) -> None:
    assert Schedule(rule).weights(step) == (rule.weight(step),)
    assert Schedule(rule).decays(step) == (rule.decay(step),)
    assert not Schedule(rule).follows(step)
    assert not Schedule(rule).follows(0)


@given(sets, every, starts, steps)
def test_each_rule_has_its_weight(
    several: tuple[rules.Rule, ...], k: int, start: int, step: int
) -> None:
    alone = [Schedule(rule, k, start).weights(step) for rule in several]
    assert Schedule(several, k, start).weights(step) == sum(alone, ())
    assert Schedule(list(several), k, start) == Schedule(several, k, start)
    assert Schedule(iter(several), k, start) == Schedule(several, k, start)


@given(schedules, steps)
def test_memory_is_touched_at_every_kth_step_from_the_start(schedule: Schedule, step: int) -> None:
    begun = step >= schedule.start_after
    due = (step - schedule.start_after) % schedule.update_every == 0
    copies = step == schedule.start_after > 0
    if not (begun and due):
        assert schedule.weights(step) == ()
    elif copies:
        assert schedule.weights(step) == (1.0,) * len(schedule.rules)
    else:
        m, k = step - schedule.start_after, schedule.update_every
        assert schedule.weights(step) == tuple(rule.weight(m, k) for rule in schedule.rules)


@given(schedules)
def test_nothing_is_due_before_the_first_step(schedule: Schedule) -> None:
    assert schedule.weights(0) == ()


@given(schedules, st.integers(0, 1000))
def test_until_the_start_it_follows(schedule: Schedule, step: int) -> None:
    assert schedule.follows(step) == (step < schedule.start_after)
    if schedule.follows(step) and step:
        assert schedule.weights(step) == ()
        assert set(schedule.decays(step)) == {0.0}


@given(schedules, steps)
def test_a_start_shifts_the_rules(schedule: Schedule, step: int) -> None:
    plain = Schedule(schedule.rules, schedule.update_every)
    shifted = step + schedule.start_after
    assert schedule.weights(shifted) == plain.weights(step)
    assert schedule.decays(shifted) == plain.decays(step)


@pytest.mark.parametrize("step", [1, 5, 30])
@pytest.mark.parametrize("value", [-1e-9, 1.0000001, math.nan, math.inf, None, "x", True, (0.5,)])
def test_a_rule_that_gives_no_weight_is_named(value: Any, step: int) -> None:
    schedule = Schedule((rules.constant(), Given(value)))
    with pytest.raises(ArgumentError, match=rf"Given\(value=(.|\n)*step {step}:"):
        schedule.weights(step)


def test_whole_weights_and_numbers_of_other_libraries() -> None:
    numpy = pytest.importorskip("numpy")
    for value in (0, 1, numpy.float32(0.5), numpy.float64(0.25)):
        (weight,) = Schedule(Given(value)).weights(1)
        assert type(weight) is float
        assert weight == value


@given(schedules)
def test_description_and_repr_rebuild_it(schedule: Schedule) -> None:
    plain = json.loads(json.dumps(schedule.to_dict()))
    assert Schedule.from_dict(plain) == schedule
    assert eval(repr(schedule), vars(rules)) == schedule
    assert hash(Schedule.from_dict(plain)) == hash(schedule)


def test_description_holds_plain_values() -> None:
    assert Schedule((rules.warmup(0.99), rules.window(3)), 3, 7).to_dict() == {
        "rules": [{"rule": "Warmup", "limit": 0.99}, {"rule": "Window", "size": 3}],
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


@pytest.mark.parametrize(
    "rule",
    [0.9, None, "constant", object(), (0.9,), (rules.constant(), None), (), {}, rules.Constant],
)
def test_what_is_no_rule(rule: Any) -> None:
    with pytest.raises(ArgumentError, match="rule"):
        Schedule(rule)


CONSTANT = {"rule": "Constant", "value": 0.5}


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"rules": [CONSTANT]},
        {"rules": [CONSTANT], "update_every": 0, "start_after": 0},
        {"rules": [CONSTANT], "update_every": 1, "start_after": -1},
        {"rules": [{"rule": "?"}], "update_every": 1, "start_after": 0},
        {"rules": [], "update_every": 1, "start_after": 0},
        {"rules": CONSTANT, "update_every": 1, "start_after": 0},
        {"rules": None, "update_every": 1, "start_after": 0},
        {"rules": "Constant", "update_every": 1, "start_after": 0},
        None,
        [],
    ],
    ids=repr,
)
def test_descriptions_of_no_schedule(plain: Any) -> None:
    with pytest.raises(ArgumentError):
        Schedule.from_dict(plain)


calls = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def taken_at_once(schedule: Schedule, before: int, steps: int) -> tuple[float, ...]:
    """The definition, step by step: which of the steps would have touched memory."""
    seen = range(before + 1, before + steps + 1)
    start, k = schedule.start_after, schedule.update_every
    if start and start in seen:
        return (1.0,) * len(schedule.rules)
    due = [n - start for n in seen if n > start and (n - start) % k == 0]
    if not due:
        return ()
    length = k * len(due)
    return tuple(
        rule.weigh(due[-1], length, rule.log_decay(due[-1] - length, k))[0]
        for rule in schedule.rules
    )


@given(schedules, calls)
def test_steps_that_are_taken_at_once(schedule: Schedule, cuts: list[int]) -> None:
    before = 0
    for steps in cuts:
        step = before + steps
        assert schedule.weights(step, steps) == taken_at_once(schedule, before, steps)
        if steps == 1:
            assert schedule.weights(step) == schedule.weights(step, 1)
        before = step


@given(st.floats(0.5, 0.9999), every, starts, calls)
def test_the_horizon_does_not_depend_on_how_steps_are_cut(
    decay: float, k: int, start: int, cuts: list[int]
) -> None:
    schedule = Schedule(rules.constant(decay), k, start)
    left, step = Fraction(1), start
    for steps in cuts:
        step += steps
        for w in schedule.weights(step, steps):
            left *= 1 - Fraction(w)
    done = (step - start) // k * k
    assert float(left) == pytest.approx(decay**done, rel=1e-9, abs=1e-13)


# -- rules that say which steps are due ------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 3, 10, 12])
@pytest.mark.parametrize("phase", [0, 1, 4, 11])
def test_a_rule_with_a_phase_is_due_where_it_says(start: int, phase: int) -> None:
    schedule = Schedule(rules.Aligned(0.9, phase), update_every=5, start_after=start)
    for step in range(1, 40):
        want: list[float] = []
        if start and step == start:
            want = [1.0]
        elif step > start and step % 5 == phase % 5:
            want = [1 - 0.9**5]
        assert list(schedule.weights(step)) == pytest.approx(want), step
    assert schedule.phase == phase % 5


def test_steps_taken_at_once_count_the_updates_due_among_them() -> None:
    schedule = Schedule(rules.Aligned(0.9, phase=2), update_every=5)
    assert schedule.weights(13, steps=12) == pytest.approx((1 - 0.9**15,))  # 2, 7 and 12
    assert schedule.weights(6, steps=4) == ()


def test_schedule_with_a_phase_is_rebuilt_from_its_description() -> None:
    schedule = Schedule(rules.Aligned(0.9, 3), update_every=5, start_after=2)
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert rules.debiased(rules.Aligned(0.9, 3)).phase == 3


def test_rules_of_several_phases_are_refused() -> None:
    with pytest.raises(ArgumentError, match="rules of one phase"):
        Schedule([rules.Aligned(0.9), rules.Constant(0.8)], update_every=5)
    for phase in (-1, 0.5, True):
        with pytest.raises(ArgumentError, match="phase="):
            rules.Aligned(0.9, phase)  # type: ignore[arg-type]
