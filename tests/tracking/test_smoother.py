from __future__ import annotations

import copy
import json
import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from fastema.errors import ArgumentError, BridgeError, CheckpointError, NonFiniteError
from fastema.tracking import ExponentialMovingAverage, MetricSmoother, SimpleMovingAverage

from ..support.damage import places


def test_gives_all_three_curves() -> None:
    rng = np.random.default_rng(0)
    smoother = MetricSmoother(5, 0.8, debias=True, record=True)
    sma, ema = SimpleMovingAverage(5), ExponentialMovingAverage(0.8, True)
    x, weights = rng.lognormal(size=60), rng.integers(1, 9, 60)
    for i, (value, weight) in enumerate(zip(x.tolist(), weights.tolist(), strict=True)):
        found = smoother.update({"loss": value}, weight, step=10 * i)
        assert found == smoother.averages
        assert found == {
            "loss_raw": value,
            "loss_sma": sma.update(value, weight),
            "loss_ema": ema.update(value, weight),
        }
    assert smoother.history["loss_raw"].tolist() == x.tolist()
    assert smoother.history["loss_sma"][-1] == sma.average
    assert set(smoother.history) == {"loss_raw", "loss_sma", "loss_ema"}
    assert smoother.steps["loss"].tolist() == list(range(0, 600, 10))


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 0},
        {"decay": 1.0},
        {"window_size": None, "decay": None, "raw": False},
        {"on_nonfinite": "hide"},
    ],
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        MetricSmoother(**options)


@pytest.mark.parametrize(
    ("metrics", "options", "error", "words"),
    [
        ({"a": 1.0, "b": "x"}, {}, BridgeError, "expected a number"),
        ({"b": 1.0}, {"weight": -1.0}, ArgumentError, "weight"),
        ({"a": 1.0, "b": math.nan}, {}, NonFiniteError, "nan"),
        *(({"a": 1.0}, {"step": k}, ArgumentError, "step") for k in (1.5, "3", 2**70)),
        ({"a": 1.0}, {"step": np.float64(2.0)}, ArgumentError, "step"),
    ],
    ids=repr,
)
def test_a_refused_update_changes_nothing(
    metrics: dict[str, Any], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    smoother = MetricSmoother(on_nonfinite="raise", record=True)
    smoother.update({"a": 2.0})
    before = smoother.state_dict()
    with pytest.raises(error, match=words):
        smoother.update(metrics, **options)
    assert smoother.state_dict() == before
    assert smoother.history["a_raw"].tolist() == [2.0]


def test_state_goes_on_or_changes_nothing() -> None:
    one, other = MetricSmoother(3, 0.5), MetricSmoother(3, 0.5, record=True)
    for x in (1.0, 4.0, math.nan, 2.0):
        one.update({"loss": x, "accuracy": x / 8})
    other.update({"gone": 1.0})
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.averages == one.averages
    assert other.update({"loss": 7.0}) == one.update({"loss": 7.0})
    before = other.state_dict()
    for state in (MetricSmoother(4, 0.5).state_dict(), {}, [], {**before, "metrics": {"loss": {}}}):
        with pytest.raises(CheckpointError):
            other.load_state_dict(state)
    assert other.state_dict() == before
    other.reset()
    assert other.averages == other.history == other.steps == {}


@pytest.mark.parametrize(
    "junk", [np.ones(2), np.array("x"), None, [], {}, "x", -1, 10**400], ids=type
)
def test_whatever_is_in_a_place_of_a_state_it_fits_or_is_refused_in_words(junk: Any) -> None:
    one = MetricSmoother(3, 0.5)
    one.update({"loss": 1.0})
    before = one.state_dict()
    for at in range(len(list(places(before)))):
        state = copy.deepcopy(before)
        tree, key = list(places(state))[at]
        tree[key] = junk
        other = MetricSmoother(3, 0.5)
        with suppress(CheckpointError):
            other.load_state_dict(state)
