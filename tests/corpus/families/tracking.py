"""Moving averages of numbers, of metrics, and as series."""

from typing import Any

import numpy as np

from fastema import tracking

from ..cases import Cases, case
from ..inputs import numbers
from ..record import attempt

CASES: Cases = {}

TRACKERS = {
    "simple": lambda **o: tracking.SimpleMovingAverage(7, **o),
    "simple 1": lambda **o: tracking.SimpleMovingAverage(1, **o),
    "exponential": lambda **o: tracking.ExponentialMovingAverage(0.9, **o),
    "debiased": lambda **o: tracking.ExponentialMovingAverage(0.9, True, **o),
}
LOSSES = [float(one) for one in numbers("loss", 0, (50,), "f64") + 2]
RTOL = 1e-13


def _read(one: Any) -> dict[str, Any]:
    return {
        "average": one.average,
        "get_average": attempt(one.get_average),
        "count": one.count,
        "num_updates": one.num_updates,
        "num_skipped": one.num_skipped,
        "repr": repr(one),
    }


@case(CASES, rtol=RTOL, tracker=TRACKERS, way=("one by one", "weighted", "many", "many weighted"))
def trackers(tracker: Any, way: str) -> Any:
    one = tracker()
    weights = [1.0 + index % 5 for index in range(50)] if "weighted" in way else [1.0] * 50
    if way.startswith("many"):
        given = {"weights": np.array(weights)} if "weighted" in way else {}
        series = np.concatenate(
            [
                one.update_many(LOSSES[:20], **_cut(given, 0, 20)),
                one.update_many(LOSSES[20:], **_cut(given, 20, 50)),
            ]
        )
    else:
        pairs = zip(LOSSES, weights, strict=True)
        series = np.array([one.update(value, weight) for value, weight in pairs])
    found = {"series": series, **_read(one), "state": one.state_dict()}
    other = one.new_like()
    found["new"] = _read(other)
    other.load_state_dict(one.state_dict())
    found["resumed"] = [one.update(3.5), other.update(3.5)]
    one.reset()
    return found | {"reset": _read(one)}


def _cut(given: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {name: one[start:stop] for name, one in given.items()}


@case(CASES, rtol=RTOL, tracker=TRACKERS, action=("show", "skip", "raise"), bad=("nan", "inf"))
def bad_losses(tracker: Any, action: str, bad: str) -> Any:
    one = attempt(lambda: tracker(on_nonfinite=action))
    if isinstance(one, Exception):
        return {"refused": one}
    for value in LOSSES[:5]:
        one.update(value)
    outcome = attempt(lambda: one.update(float(bad)))
    return {"outcome": outcome, "next": attempt(lambda: one.update(LOSSES[6])), **_read(one)}


SMOOTHERS: dict[str, dict[str, Any]] = {
    "default": {},
    "window": {"decay": None, "window_size": 5},
    "decay": {"window_size": None, "decay": 0.8},
    "debiased": {"debias": True},
    "averages alone": {"raw": False},
    "recording": {"record": True, "window_size": 3},
}


@case(CASES, rtol=RTOL, options=SMOOTHERS)
def smoothers(options: dict[str, Any]) -> Any:
    one = tracking.MetricSmoother(**options)
    logs = {}
    for step, value in enumerate(LOSSES[:25]):
        metrics = {"loss": value} | ({"acc": 1 / (step + 2)} if step % 3 else {})
        logs[step] = one.update(metrics, weight=1.0 + step % 2, step=step)
    return {
        "logs": logs,
        "steps": one.steps,
        "history": attempt(lambda: one.history),
        "state": one.state_dict(),
        "averages": {name: str(type(a).__name__) for name, a in one.averages.items()},
    }


@case(CASES, rtol=RTOL)
def groups() -> Any:
    averages = {"a": tracking.SimpleMovingAverage(3), "b": tracking.ExponentialMovingAverage(0.5)}
    one = tracking.MetricAverages(averages)
    logs = {i: one.update({"a": value, "b": i + 0.5}) for i, value in enumerate(LOSSES[:12])}
    state = one.state_dict()
    one.reset()
    after = one.update({"a": 1.5})
    return {"logs": logs, "state": state, "after a reset": after}


@case(CASES, bad=("decay", "window", "weight", "text", "state", "option", "none", "both none"))
def refusals(bad: str) -> Any:
    tries = {
        "decay": lambda: tracking.ExponentialMovingAverage(1.5),
        "window": lambda: tracking.SimpleMovingAverage(0),
        "weight": lambda: tracking.SimpleMovingAverage(3).update(1.0, -2.0),
        "text": lambda: tracking.SimpleMovingAverage(3).update("loss"),
        "state": lambda: tracking.SimpleMovingAverage(3).load_state_dict({"a": 1}),
        "option": lambda: tracking.ExponentialMovingAverage(0.9, on_nonfinite="ignore"),
        "none": lambda: tracking.SimpleMovingAverage(3).get_average(),
        "both none": lambda: tracking.MetricSmoother(None, None),
    }
    return {"outcome": attempt(tries[bad])}
