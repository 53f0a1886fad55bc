"""Numbers that are read from a device when somebody looks."""

from __future__ import annotations

import math
import numbers
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fastema.tracking import ExponentialMovingAverage, MetricSmoother, SimpleMovingAverage
from fastema.tracking.lazy_float import LazyFloat
from fastema.tracking.scalar import MOST_PENDING


class Device:
    """Values on a device; counts how often it is asked for one."""

    reads = 0

    def value(self, x: float) -> LazyFloat:
        def read() -> float:
            self.reads += 1
            return x

        return LazyFloat(read)


def test_a_lazy_float_is_a_float_that_is_read_once() -> None:
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
    assert type(pickle.loads(pickle.dumps(x))) is float


@pytest.mark.parametrize(
    "made", [lambda: SimpleMovingAverage(3), lambda: ExponentialMovingAverage()]
)
def test_nothing_is_read_before_somebody_looks_or_there_are_too_many(made: Any) -> None:
    device, average, plain = Device(), made(), made()
    x = np.random.default_rng(0).normal(size=40).tolist()
    found = []
    for i, value in enumerate(x):
        # Numbers of the host wait in line with those of the device.
        found.append(average.update(device.value(value) if i % 3 else value, 1.0 + i % 2))
    assert device.reads == 0
    expected = [plain.update(value, 1.0 + i % 2) for i, value in enumerate(x)]
    assert found[20] == expected[20]
    assert device.reads == sum(1 for i in range(21) if i % 3)  # those before it, and its own
    assert found == expected
    assert device.reads == sum(1 for i in range(len(x)) if i % 3)
    assert average.state_dict() == plain.state_dict()
    device.reads = 0
    for _ in range(MOST_PENDING - 1):
        average.update(device.value(1.0))
    assert device.reads == 0
    average.update(device.value(4.0))
    assert device.reads == MOST_PENDING


def failing(error: type[BaseException]) -> Any:
    def read() -> float:
        raise error("device lost")

    return read


def test_results_from_before_stay_what_they_were() -> None:
    device, average = Device(), SimpleMovingAverage(2)
    found = [average.update(device.value(4.0)), average.update(LazyFloat(failing(RuntimeError)))]
    found.append(average.update(device.value(6.0)))
    other = SimpleMovingAverage(2)
    other.update(100.0)
    average.load_state_dict(other.state_dict())
    assert average.average == 100.0
    average.reset()
    assert average.num_updates == 0
    assert (found[0], found[2]) == (4.0, 5.0)
    with pytest.raises(RuntimeError, match="device lost"):
        float(found[1])
    # An interrupted read has lost nothing.
    average.update(1.0)
    reads = iter([failing(KeyboardInterrupt), lambda: 9.0])
    interrupted = average.update(LazyFloat(lambda: next(reads)()))
    with pytest.raises(KeyboardInterrupt):
        float(interrupted)
    assert interrupted == average.average == 5.0


def test_a_smoother_goes_on_after_a_number_that_cannot_be_read() -> None:
    smoother = MetricSmoother(2, None, record=True)
    smoother.update({"loss": 1.0})
    smoother.update({"loss": LazyFloat(failing(RuntimeError))})
    with pytest.raises(RuntimeError, match="device lost"):
        smoother.averages  # noqa: B018 - reading is the test
    smoother.state_dict()
    assert smoother.update({"loss": 3.0}) == {"loss_raw": 3.0, "loss_sma": 2.0}
    np.testing.assert_equal(smoother.history["loss_sma"].tolist(), [1.0, math.nan, 2.0])
    assert len(smoother.steps["loss"]) == 3


@pytest.mark.parametrize(
    ("module", "make"), [("numpy", "array"), ("torch", "tensor"), ("jax.numpy", "array")]
)
def test_arrays_and_functions_calculate_with_a_lazy_float(module: str, make: str) -> None:
    framework = pytest.importorskip(module)
    x, array = Device().value(2.0), getattr(framework, make)([1.0, 5.0])
    assert (array - x).tolist() == [-1.0, 3.0]
    assert (x - array).tolist() == [1.0, -3.0]
    if module == "torch":
        assert framework.add(array, x, alpha=2).tolist() == [5.0, 9.0]
    assert np.array([x, x]).dtype == np.float64
    assert not np.isnan(x)
    assert np.exp(x) == math.exp(2.0)
    assert (Fraction(1, 2) + x, x + 1j) == (2.5, 2 + 1j)
    assert (x.real, x.imag, x.item(), complex(x)) == (2.0, 0.0, 2.0, 2 + 0j)
