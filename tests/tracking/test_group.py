from __future__ import annotations

import json
from typing import Any

import pytest

from fastema.errors import ArgumentError, BridgeError, CheckpointError
from fastema.tracking import ExponentialMovingAverage, MetricAverages, SimpleMovingAverage


def made() -> MetricAverages:
    return MetricAverages(
        {"loss": SimpleMovingAverage(2), "accuracy": ExponentialMovingAverage(0.75)}
    )


def test_each_name_has_its_own_average() -> None:
    group = made()
    assert group.update({"loss": 3.0, "accuracy": 0.5}) == {"loss": 3.0, "accuracy": 0.5}
    assert group.update({"accuracy": 1.0}) == {"accuracy": 0.625}
    assert group.update({"loss": 6.0}, weight=2.0) == {"loss": 5.0}
    assert group.averages == {"loss": 5.0, "accuracy": 0.625}
    assert list(group) == ["loss", "accuracy"]
    assert len(group) == 2
    assert isinstance(group["loss"], SimpleMovingAverage)
    assert repr(group) == f"MetricAverages({dict(group)!r})"


@pytest.mark.parametrize(
    ("metrics", "error", "words"),
    [
        ({"loss": 9.0, "acc": 1.0}, ArgumentError, r"'acc'.*'loss', 'accuracy'"),
        ({"loss": "low"}, BridgeError, "expected a number"),
    ],
)
def test_a_refused_update_changes_nothing(metrics: Any, error: Any, words: str) -> None:
    group = made()
    group.update({"loss": 3.0})
    with pytest.raises(error, match=words):
        group.update(metrics)
    assert group["loss"].num_updates == 1


ONE = SimpleMovingAverage(2)


@pytest.mark.parametrize("averages", [{}, None, [ONE], {"loss": 3}, {1: ONE}, {"a": dict}])
def test_refused(averages: Any) -> None:
    with pytest.raises(ArgumentError, match="averages"):
        MetricAverages(averages)
    with pytest.raises(ArgumentError, match="two names"):
        MetricAverages({"a": ONE, "b": ONE})


def test_state_goes_on_or_changes_nothing() -> None:
    group, other = made(), made()
    for x in (1.0, 4.0, 2.0):
        group.update({"loss": x, "accuracy": x / 4})
    other.load_state_dict(json.loads(json.dumps(group.state_dict())))
    assert other.update({"loss": 0.3, "accuracy": 0.1}) == group.update(
        {"loss": 0.3, "accuracy": 0.1}
    )
    before, loss = other.averages, {"loss": made()["loss"].state_dict()}
    with pytest.raises(CheckpointError, match="loss"):
        other.load_state_dict(loss)
    with pytest.raises(CheckpointError, match="decay"):
        other.load_state_dict(loss | {"accuracy": ExponentialMovingAverage(0.5).state_dict()})
    assert other.averages == before
    other.reset()
    assert other["loss"].num_updates == other["accuracy"].num_updates == 0
