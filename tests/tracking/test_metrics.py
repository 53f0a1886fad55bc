"""Averages of several metrics: each name has its own, in one group or as one smoother."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from fastema.errors import ArgumentError, BridgeError, CheckpointError, NonFiniteError
from fastema.tracking import (
    ExponentialMovingAverage,
    MetricAverages,
    MetricSmoother,
    SimpleMovingAverage,
)

ONE = SimpleMovingAverage(2)


def grouped() -> MetricAverages:
    return MetricAverages(
        {"loss": SimpleMovingAverage(2), "accuracy": ExponentialMovingAverage(0.75)}
    )


def test_each_name_of_a_group_has_its_own_average() -> None:
    group = grouped()
    assert group.update({"loss": 3.0, "accuracy": 0.5}) == {"loss": 3.0, "accuracy": 0.5}
    assert group.update({"accuracy": 1.0}) == {"accuracy": 0.625}
    assert group.update({"loss": 6.0}, weight=2.0) == {"loss": 5.0}
    assert group.averages == {"loss": 5.0, "accuracy": 0.625}
    assert list(group) == ["loss", "accuracy"]
    assert isinstance(group["loss"], SimpleMovingAverage)


def test_a_smoother_gives_all_three_curves() -> None:
    rng = np.random.default_rng(0)
    smoother = MetricSmoother(5, 0.8, debias=True, record=True)
    sma, ema = SimpleMovingAverage(5), ExponentialMovingAverage(0.8, True)
    x, weights = rng.lognormal(size=60).tolist(), rng.integers(1, 9, 60).tolist()
    for i, (value, weight) in enumerate(zip(x, weights, strict=True)):
        found = smoother.update({"loss": value}, weight, step=10 * i)
        each = value, sma.update(value, weight), ema.update(value, weight)
        assert found == smoother.averages
        assert found == dict(zip(("loss_raw", "loss_sma", "loss_ema"), each, strict=True))
    assert set(smoother.history) == set(found)
    assert smoother.history["loss_raw"].tolist() == x
    assert smoother.history["loss_sma"][-1] == sma.average
    assert smoother.steps["loss"].tolist() == list(range(0, 600, 10))


def test_groups_and_smoothers_that_cannot_be() -> None:
    averages: Any
    for averages in ({}, None, [ONE], {"loss": 3}, {1: ONE}, {"a": dict}, {"a": ONE, "b": ONE}):
        with pytest.raises(ArgumentError, match=r"averages|two names"):
            MetricAverages(averages)
    options: Any
    for options in (
        *({"window_size": 0}, {"decay": 1.0}, {"on_nonfinite": "hide"}),
        {"window_size": None, "decay": None, "raw": False},
    ):
        with pytest.raises(ArgumentError):
            MetricSmoother(**options)


@pytest.mark.parametrize(
    ("made", "metrics", "options", "error", "words"),
    [
        (grouped, {"loss": 9.0, "x": 1.0}, {}, ArgumentError, r"'x'.*'loss', 'accuracy'"),
        (grouped, {"loss": "low"}, {}, BridgeError, "expected a number"),
        (MetricSmoother, {"loss": 1.0, "b": "x"}, {}, BridgeError, "expected a number"),
        (MetricSmoother, {"b": 1.0}, {"weight": -1.0}, ArgumentError, "weight"),
        (MetricSmoother, {"loss": 1.0, "b": math.nan}, {}, NonFiniteError, "nan"),
        *(
            (MetricSmoother, {"loss": 1.0}, {"step": step}, ArgumentError, "step")
            for step in (1.5, "3", 2**70, np.float64(2.0))
        ),
    ],
    ids=lambda one: getattr(one, "__name__", repr(one)),
)
def test_a_refused_update_changes_nothing(
    made: Any, metrics: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    found = made() if made is grouped else made(on_nonfinite="raise", record=True)
    found.update({"loss": 2.0})
    before = found.state_dict()
    with pytest.raises(error, match=words):
        found.update(metrics, **options)
    assert found.state_dict() == before
    if made is MetricSmoother:
        assert found.history["loss_raw"].tolist() == [2.0]


@pytest.mark.parametrize("made", [grouped, lambda: MetricSmoother(3, 0.5, record=True)])
def test_state_goes_on_or_changes_nothing(made: Any) -> None:
    one, other = made(), made()
    for x in (1.0, 4.0, math.nan, 2.0):
        one.update({"loss": x, "accuracy": x / 8})
    other.update({"loss" if made is grouped else "gone": 1.0})
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.averages == one.averages
    assert other.update({"loss": 7.0}) == one.update({"loss": 7.0})
    before = other.state_dict()
    wrong: list[Any] = [{}, [], MetricSmoother(4, 0.5).state_dict(), {"loss": before}]
    if made is grouped:
        wrong.append(before | {"accuracy": ExponentialMovingAverage(0.5).state_dict()})
    else:
        wrong.append({**before, "metrics": {"loss": {}}})
    for state in wrong:
        with pytest.raises(CheckpointError):
            other.load_state_dict(state)
    assert other.state_dict() == before
    other.reset()
    if made is grouped:
        assert other["loss"].num_updates == other["accuracy"].num_updates == 0
    else:
        assert other.averages == other.history == other.steps == {}
