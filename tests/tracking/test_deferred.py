from __future__ import annotations

import copy
import json
import math
import numbers
import pickle
from typing import Any

import numpy as np
import pytest

import fastema.tracking.deferred as module
from fastema.errors import NonFiniteError
from fastema.tracking import ExponentialMovingAverage, MetricSmoother, SimpleMovingAverage
from fastema.tracking.deferred import Deferred
from fastema.tracking.scalar import MOST_PENDING


class Device:
    """Values on a device that can be read once they are there; counts how often it is asked."""

    def __init__(self) -> None:
        self.reads = 0

    def value(self, x: float) -> Deferred:
        def read() -> float:
            self.reads += 1
            return x

        return Deferred(read)


def test_a_deferred_number_is_a_float_that_is_read_once() -> None:
    device = Device()
    x = device.value(2.5)
    assert device.reads == 0
    assert (x + 1, 1 + x, x * x, x / 2, 5 / x, x**2, 2**x, -x, abs(x)) == (
        *(3.5, 3.5, 6.25, 1.25, 2.0, 6.25, 2**2.5, -2.5, 2.5),
    )
    assert (x // 2, x % 2, divmod(x, 2), round(x), int(x), math.floor(x), math.ceil(x)) == (
        *(1.0, 0.5, (1.0, 0.5), 2, 2, 2, 3),
    )
    assert x == 2.5
    assert x != 3
    assert 2 < x < 3
    assert x >= device.value(2.5)
    assert hash(x) == hash(2.5)
    assert f"{x} {x!r} {x:.3f}" == "2.5 2.5 2.500"
    assert isinstance(x, numbers.Real)
    assert max(1.0, x) is x
    assert np.float64(x) == 2.5
    assert np.asarray([x], np.float64).tolist() == [2.5]
    assert device.reads == 2  # the other one once


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_are_floats(clone: Any) -> None:
    found = clone(Device().value(0.5))
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize(
    "made", [lambda: SimpleMovingAverage(3), lambda: ExponentialMovingAverage()]
)
def test_nothing_is_read_before_somebody_looks(made: Any) -> None:
    device, average, plain = Device(), made(), made()
    x = np.random.default_rng(0).normal(size=40).tolist()
    found = []
    for i, value in enumerate(x):
        # Numbers of the host wait in line with those of the device.
        found.append(average.update(device.value(value) if i % 3 else value, 1.0 + i % 2))
    assert device.reads == 0
    expected = [plain.update(value, 1.0 + i % 2) for i, value in enumerate(x)]
    assert found[20] == expected[20]
    assert device.reads == sum(1 for i in range(len(x)) if i % 3)
    assert found == expected
    assert average.average == plain.average
    assert average.num_updates == len(x)
    assert average.state_dict() == plain.state_dict()


def test_all_are_read_before_they_are_too_many() -> None:
    device, average = Device(), SimpleMovingAverage(3)
    for _ in range(MOST_PENDING - 1):
        average.update(device.value(1.0))
    assert device.reads == 0
    average.update(device.value(4.0))
    assert device.reads == MOST_PENDING
    assert average.average == 2.0


def test_a_number_that_is_refused_is_dropped() -> None:
    device, average = Device(), SimpleMovingAverage(3, on_nonfinite="raise")
    for x in (1.0, math.nan, 3.0):
        average.update(device.value(x))
    with pytest.raises(NonFiniteError):
        average.get_average()
    assert average.average == 2.0
    average.update(device.value(math.inf))
    average.reset()
    assert average.num_updates == 0


def test_a_smoother_reads_nothing_either() -> None:
    device, smoother = Device(), MetricSmoother(2, 0.5, record=True)
    found = [smoother.update({"loss": device.value(x)}) for x in (1.0, 3.0, 5.0)]
    assert device.reads == 0
    assert [one["loss_sma"] for one in found] == [1.0, 2.0, 4.0]
    assert [one["loss_raw"] for one in found] == [1.0, 3.0, 5.0]
    assert device.reads == 3
    assert smoother.history["loss_ema"].tolist() == [1.0, 2.0, 3.5]
    json.dumps(smoother.averages)


def test_what_a_framework_keeps_is_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "scalar", lambda value: lambda: float(len(value)))
    found = module.number("four")
    assert isinstance(found, Deferred)
    assert found == 4.0
