"""Schedules: when averages are updated, and with what weights."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError
from fastema.rules import Schedule

decays = st.floats(0.0, 0.9999)
any_rule = st.one_of(
    st.builds(rules.constant, decays),
    st.builds(rules.warmup, decays),
    st.builds(rules.inverse_gamma, decays),
    st.builds(rules.power, st.floats(0.01, 0.28)),
    st.builds(rules.cumulative_mean),
    st.builds(rules.window, st.integers(1, 20)),
    st.builds(rules.debiased, st.builds(rules.warmup, decays)),
)
sets = st.lists(any_rule, min_size=1, max_size=4).map(tuple)
schedules = st.builds(Schedule, sets, st.integers(1, 50), st.integers(0, 200))


@given(schedules, st.integers(1, 1000))
def test_every_kth_step_from_the_start_has_weights(schedule: Schedule, step: int) -> None:
    m, k = step - schedule.start_after, schedule.update_every
    if m < 0 or m % k:
        assert schedule.weights(step) == ()
    elif m == 0:
        assert schedule.weights(step) == (1.0,) * len(schedule.rules)  # a copy
    else:
        assert schedule.weights(step) == tuple(rule.weight(m, k) for rule in schedule.rules)


@given(st.integers(1, 9), st.integers(0, 20), st.integers(1, 200), st.integers(1, 60))
def test_several_steps_at_once_count_every_kth_step(
    every: int, start: int, before: int, steps: int
) -> None:
    decay = 0.97
    schedule = Schedule(rules.constant(decay), every, start)
    begun = start + before
    due = sum((n - start) % every == 0 for n in range(begun + 1, begun + steps + 1))
    want = [1 - decay ** (due * every)] if due else []
    assert list(schedule.weights(begun + steps, steps)) == pytest.approx(want)


@dataclass(frozen=True)
class FixedWeight(rules.Rule):
    value: Any

    def decay(self, n: int) -> Any:
        return self.value

    def weight(self, n: int, every: int = 1) -> Any:
        return self.value


@pytest.mark.parametrize("value", [-1e-9, 1.0000001, math.nan, math.inf, None, "x", True, (0.5,)])
def test_a_rule_with_an_invalid_weight_is_named(value: Any) -> None:
    schedule = Schedule((rules.constant(), FixedWeight(value)))
    for step in (1, 5, 30):
        with pytest.raises(ArgumentError, match=rf"FixedWeight\(value=(.|\n)*step {step}:"):
            schedule.weights(step)


@given(schedules)
def test_description_and_repr_rebuild_the_schedule(schedule: Schedule) -> None:
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule == eval(repr(schedule), vars(rules))
    assert hash(again) == hash(schedule)


CONSTANT = {"rule": "Constant", "value": 0.5}


@pytest.mark.parametrize(
    "plain",
    [
        *(None, [], {}, {"rules": [CONSTANT]}),
        {"rules": [CONSTANT], "update_every": 0, "start_after": 0},
        {"rules": [CONSTANT], "update_every": 1, "start_after": -1},
        *(
            {"rules": odd, "update_every": 1, "start_after": 0}
            for odd in ([{"rule": "?"}], [], CONSTANT, None, "Constant")
        ),
    ],
    ids=repr,
)
def test_invalid_descriptions_are_refused(plain: Any) -> None:
    with pytest.raises(ArgumentError):
        Schedule.from_dict(plain)


def test_invalid_rules_and_phases_are_refused() -> None:
    for odd in (0.9, None, "constant", (0.9,), (rules.constant(), None), (), {}, rules.Constant):
        with pytest.raises(ArgumentError, match="rule"):
            Schedule(odd)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="rules of the same phase"):
        Schedule([rules.Aligned(0.9), rules.Constant(0.8)], update_every=5)
    for phase in (-1, 0.5, True):
        with pytest.raises(ArgumentError, match="phase="):
            rules.Aligned(0.9, phase)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [0, 1, 3, 10, 12])
@pytest.mark.parametrize("phase", [0, 1, 4, 11])
def test_a_rule_with_a_phase_is_due_at_its_phase(start: int, phase: int) -> None:
    schedule = Schedule(rules.Aligned(0.9, phase), update_every=5, start_after=start)
    for step in range(1, 40):
        want: list[float] = []
        if start and step == start:
            want = [1.0]
        elif step > start and step % 5 == phase % 5:
            want = [1 - 0.9**5]
        assert list(schedule.weights(step)) == pytest.approx(want), step
    assert schedule.phase == phase % 5
