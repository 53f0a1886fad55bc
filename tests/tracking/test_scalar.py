"""Averages of scalars: single values, series, groups, and lazily read device numbers."""

import copy
import json
import math
import numbers
import pickle
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
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
from fastema.tracking.lazy_float import LazyFloat
from fastema.tracking.scalar import MAX_PENDING, MovingAverage
from fastema.tracking.window import WindowSum

Factory = Callable[..., MovingAverage]

KINDS: dict[str, Factory] = {
    **{f"sma{n}": partial(SimpleMovingAverage, n) for n in (1, 7, 200)},
    **{f"ema{d}": partial(ExponentialMovingAverage, d) for d in (0.0, 0.3, 0.9, 0.9995)},
    **{f"debiased{d}": partial(ExponentialMovingAverage, d, True) for d in (0.9, 0.9995)},
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def exact(average: MovingAverage, x: Sequence[float], weights: Sequence[float]) -> float:
    """Evaluate the definition in rational numbers and round once."""
    w = [Fraction(one) for one in weights]
    values = [Fraction(one) for one in x]
    if isinstance(average, SimpleMovingAverage):
        values, w = values[-average.window_size :], w[-average.window_size :]
        return float(sum(a * b for a, b in zip(w, values, strict=True)) / sum(w))
    assert isinstance(average, ExponentialMovingAverage)
    decay = Fraction(average.decay)
    product = total = Fraction(0)
    for i, (one, value) in enumerate(zip(w, values, strict=True)):
        share = Fraction(1) if i == 0 and not average.debias else 1 - decay
        product = decay * product + share * one * value
        total = decay * total + share * one
        # 200 bits keep the truncation error far below the tolerance.
        product, total = (Fraction(round(q * 2**200), 2**200) for q in (product, total))
    return float(product / total)


def series(n: int, seed: int = 0, sign: bool = False) -> list[float]:
    rng = np.random.default_rng(seed)
    x = rng.lognormal(0.0, 2.0, n)
    return (x * rng.choice([-1.0, 1.0], n) if sign else x).tolist()


@kinds
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sign", [False, True])
def test_averages_equal_exact_ones(make: Factory, weighted: bool, sign: bool) -> None:
    x = series(450, seed=weighted + 2 * sign, sign=sign)
    rng = np.random.default_rng(5)
    weights = rng.integers(1, 65, len(x)).astype(float).tolist() if weighted else [1.0] * len(x)
    average, parts = make(), make()
    assert math.isnan(average.average)
    ones = []
    for i, (value, weight) in enumerate(zip(x, weights, strict=True)):
        ones.append(average.update(value, weight))
        assert ones[-1] == average.average == average.get_average()
        if i % 37 < 2 or i > 440:
            expected = exact(average, x[: i + 1], weights[: i + 1])
            # With both signs, the error is relative to the summands.
            scale = max(abs(expected), max(map(abs, x[: i + 1])) * 1e-2)
            assert abs(ones[-1] - expected) <= 4e-16 * scale, i
    # update_many gives the same values, however the series is split.
    found: list[float] = []
    for begin, end in ((0, 0), (0, 1), (1, 4), (4, 205), (205, 206), (206, 400)):
        part = weights[begin:end] if weighted else None
        found += parts.update_many(x[begin:end], part).tolist()
    found += [parts.update(x[i], weights[i]) for i in range(400, 450)]
    np.testing.assert_allclose(found, ones, rtol=4e-15, atol=1e-15)
    assert parts.num_updates == average.num_updates == len(x)
    if not weighted and isinstance(average, SimpleMovingAverage):
        assert found == ones  # bitwise


@kinds
def test_series_without_weights_follows_weighted_values(make: Factory) -> None:
    x, single, at_once = series(12, 8), make(), make()
    for average in (single, at_once):
        average.update(x[0], 3.0)
    found = at_once.update_many(x[1:])
    np.testing.assert_allclose(found, [single.update(value) for value in x[1:]], rtol=1e-14)


ODD = [1.0, math.nan, 3.0, 5.0, math.inf, -math.inf, 2.0, 4.0]


def run(average: MovingAverage, x: Sequence[float], at_once: bool) -> list[float]:
    # A masked value is skipped like NaN.
    masked = np.ma.masked_invalid(x) if average.on_nonfinite == "skip" else x
    return average.update_many(masked).tolist() if at_once else [average.update(v) for v in x]


@pytest.mark.parametrize("at_once", [False, True])
@kinds
def test_tiny_values_down_to_the_documented_bound_are_averaged(
    make: Factory, at_once: bool
) -> None:
    x, weights = series(300, 4), series(300, 5)
    tiny = [value * 2.0**-600 for value in x]  # about 1e-181

    def averages(values: list[float]) -> np.ndarray:
        average = make()
        if at_once:
            return average.update_many(values, weights)
        return np.array([average.update(v, w) for v, w in zip(values, weights, strict=True)])

    np.testing.assert_allclose(averages(tiny) * 2.0**600, averages(x), rtol=1e-13)


@pytest.mark.parametrize("at_once", [False, True])
@kinds
def test_show_returns_and_skip_omits_nonfinite_values(make: Factory, at_once: bool) -> None:
    clean = make()
    kept = [clean.update(v) for v in ODD if math.isfinite(v)]
    shown, skipping = make(), make(on_nonfinite="skip")
    expected, latest, rest = [], math.nan, iter(kept)
    stays = []
    for v in ODD:
        latest = next(rest) if math.isfinite(v) else latest
        expected.append(latest if math.isfinite(v) else v)
        stays.append(latest)
    np.testing.assert_allclose(run(shown, ODD, at_once), expected, rtol=5e-16)
    np.testing.assert_allclose(run(skipping, ODD, at_once), stays, rtol=5e-16)
    assert shown.num_skipped == skipping.num_skipped == 3
    assert shown.num_updates == skipping.num_updates == len(ODD) - 3
    assert shown.update(7.0) == skipping.update(7.0) == pytest.approx(clean.update(7.0), rel=5e-16)
    shown.update(math.nan)
    assert math.isnan(shown.average)


@pytest.mark.parametrize("at_once", [False, True])
def test_propagate_follows_arithmetic(at_once: bool) -> None:
    sma = SimpleMovingAverage(2, on_nonfinite="propagate")
    found = run(sma, [1.0, math.nan, 3.0, 5.0, math.inf, 2.0, 4.0], at_once)
    np.testing.assert_equal(found, [1.0, math.nan, math.nan, 4.0, math.inf, math.inf, 3.0])
    ema = ExponentialMovingAverage(0.5, on_nonfinite="propagate")
    assert np.isnan(run(ema, [1.0, math.nan, 3.0], at_once)).tolist() == [False, True, True]
    assert sma.num_skipped == 0
    ema.reset()
    assert run(ema, [1.0, math.inf, 1.0], at_once) == [1.0, math.inf, math.inf]


@kinds
def test_raise_changes_nothing(make: Factory) -> None:
    average, other = make(on_nonfinite="raise"), make()
    average.update(2.0)
    other.update(2.0)
    with pytest.raises(NonFiniteError, match="inf"):
        average.update(math.inf)
    with pytest.raises(NonFiniteError, match=r"values\[2\] is nan"):
        average.update_many([1.0, 2.0, math.nan])
    assert average.update(5.0) == other.update(5.0)
    assert average.num_updates == 2


@kinds
def test_zero_weight_leaves_the_average_unchanged(make: Factory) -> None:
    average, other = make(), make()
    for value, weight in ((1.0, 2.0), (math.nan, 0.0), (9.0, 0.0), (4.0, 3.0)):
        found = average.update(value, weight)
        if weight:
            expected = other.update(value, weight)
        assert found == expected
    at_once = make().update_many([1.0, math.nan, 9.0, 4.0], [2.0, 0.0, 0.0, 3.0])
    assert at_once[-1] == pytest.approx(expected, rel=1e-15)
    assert (average.num_updates, average.num_skipped) == (2, 0)


def test_invalid_series_is_refused_and_changes_nothing() -> None:
    average, none, two = SimpleMovingAverage(), None, [1.0, 2.0]
    for values, weights, words in (
        *((odd, none, "real numbers") for odd in (["a"], [1j], {"a": 1.0}, np.zeros(2, "M8[s]"))),
        *(([[1.0]], none, r"one dimension, got shape \(1, 1\)"), (1.0, none, "one dimension")),
        (two, [1.0], "one for each of 2 values, got 1"),
        *((two, [1.0, odd], r"weights\[1\]=") for odd in (-1.0, math.nan, 1e-101, 1e101)),
    ):
        with pytest.raises(ArgumentError, match=words):
            average.update_many(values, weights)
    assert average.num_updates == 0


SETTINGS: list[tuple[Any, str, tuple[Any, ...]]] = [
    (SimpleMovingAverage, "window_size", (0, -1, 2.0, True, "3", None, 10**13)),
    (ExponentialMovingAverage, "decay", (1.0, -0.1, math.nan, "0.9", None)),
    (ExponentialMovingAverage, "debias", (1,)),
    (SimpleMovingAverage, "on_nonfinite", ("ignore",)),
]


def test_invalid_settings_are_refused_and_settings_are_read_only() -> None:
    for kind, setting, values in SETTINGS:
        for value in values:
            with pytest.raises(ArgumentError, match=setting):
                kind(**{setting: value})
        with pytest.raises(AttributeError):
            setattr(kind(), setting, getattr(kind(), setting))


@kinds
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_state_continues_the_average(make: Factory, weighted: bool, count: int) -> None:
    x = series(count + 250, seed=count)
    average = make()
    for i, value in enumerate(x[:count]):
        average.update(value, 1.0 + i % 3 if weighted else 1.0)
    average.update(math.nan)
    loaded = make()
    loaded.update(123.0)
    loaded.load_state_dict(json.loads(json.dumps(average.state_dict())))
    copied = copy.deepcopy(average), copy.copy(average), pickle.loads(pickle.dumps(average))
    for value in x[count:]:
        expected = average.update(value, 2.0 if weighted else 1.0)
        for other in (loaded, *copied):
            found = other.update(value, 2.0 if weighted else 1.0)
            assert found == pytest.approx(expected, rel=1e-15)
    for other in (loaded, *copied):
        assert (other.num_updates, other.num_skipped) == (average.num_updates, 1)
    assert average.count == min(len(x), getattr(average, "window_size", len(x)))
    average.reset()
    assert (average.count, average.num_updates, average.num_skipped) == (0, 0, 0)
    assert average.update(5.0) == 5.0


THREE, SLOW = SimpleMovingAverage(3), ExponentialMovingAverage(0.9)


STATES: list[tuple[MovingAverage, Any]] = [
    (THREE, SimpleMovingAverage(4).state_dict()),
    (THREE, SLOW.state_dict()),
    (SLOW, ExponentialMovingAverage(0.8).state_dict()),
    (SLOW, ExponentialMovingAverage(0.9, True).state_dict()),
    *((THREE, THREE.state_dict() | {name: [1.0]}) for name in ("products", "weights", "average")),
    *((THREE, {}), (SLOW, None), (SLOW, SLOW.state_dict() | {"state": 1})),
]


def test_mismatched_state_is_refused_and_changes_nothing() -> None:
    for average, state in STATES:
        loaded = copy.copy(average)
        loaded.update(2.0)
        with pytest.raises(CheckpointError):
            loaded.load_state_dict(state)
        assert (loaded.average, loaded.num_updates) == (2.0, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 127, 128, 129, 300])  # from 128 on, NumPy sums
@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan, 1e300])
def test_values_that_left_the_window_leave_no_trace(size: int, odd: float) -> None:
    rng = np.random.default_rng(7)
    x = rng.uniform(0.1, 1.0, 3 * size + 5).tolist()
    for at in {0, size // 2, size - 1, size}:
        spoilt = x.copy()
        spoilt[at] = odd
        clean, window = WindowSum(size), WindowSum(size)
        sums = [(clean.push(a), window.push(b)) for a, b in zip(x, spoilt, strict=True)]
        for i, (expected, found) in enumerate(sums):
            if at <= i < at + size:
                assert found != expected
                assert math.isnan(found) == math.isnan(odd)
            else:
                assert found == expected, (at, i)


ONE = SimpleMovingAverage(2)


def build_group() -> MetricAverages:
    return MetricAverages(
        {"loss": SimpleMovingAverage(2), "accuracy": ExponentialMovingAverage(0.75)}
    )


def test_each_name_of_a_group_has_its_own_average() -> None:
    group = build_group()
    assert group.update({"loss": 3.0, "accuracy": 0.5}) == {"loss": 3.0, "accuracy": 0.5}
    assert group.update({"accuracy": 1.0}) == {"accuracy": 0.625}
    assert group.update({"loss": 6.0}, weight=2.0) == {"loss": 5.0}
    assert group.averages == {"loss": 5.0, "accuracy": 0.625}
    assert list(group) == ["loss", "accuracy"]
    assert isinstance(group["loss"], SimpleMovingAverage)


def test_smoother_records_raw_sma_and_ema_curves() -> None:
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


def test_invalid_groups_and_smoothers_are_refused() -> None:
    averages: Any
    for averages in ({}, None, [ONE], {"loss": 3}, {1: ONE}, {"a": dict}, {"a": ONE, "b": ONE}):
        with pytest.raises(ArgumentError, match=r"averages|two names"):
            MetricAverages(averages)
    nothing = {"window_size": None, "decay": None, "raw": False}
    options: Any
    for options in ({"window_size": 0}, {"decay": 1.0}, {"on_nonfinite": "hide"}, nothing):
        with pytest.raises(ArgumentError):
            MetricSmoother(**options)


@pytest.mark.parametrize(
    ("make", "metrics", "options", "error", "words"),
    [
        (build_group, {"loss": 9.0, "x": 1.0}, {}, ArgumentError, r"'x'.*'loss', 'accuracy'"),
        (build_group, {"loss": "low"}, {}, BridgeError, "expected a number"),
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
def test_refused_update_changes_nothing(
    make: Any, metrics: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    found = make() if make is build_group else make(on_nonfinite="raise", record=True)
    found.update({"loss": 2.0})
    before = found.state_dict()
    with pytest.raises(error, match=words):
        found.update(metrics, **options)
    assert found.state_dict() == before
    if make is MetricSmoother:
        assert found.history["loss_raw"].tolist() == [2.0]


@pytest.mark.parametrize("make", [build_group, lambda: MetricSmoother(3, 0.5, record=True)])
def test_state_of_a_group_or_smoother_loads_or_changes_nothing(make: Any) -> None:
    one, other = make(), make()
    for x in (1.0, 4.0, math.nan, 2.0):
        one.update({"loss": x, "accuracy": x / 8})
    other.update({"loss" if make is build_group else "gone": 1.0})
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.averages == one.averages
    assert other.update({"loss": 7.0}) == one.update({"loss": 7.0})
    before = other.state_dict()
    wrong: list[Any] = [{}, [], MetricSmoother(4, 0.5).state_dict(), {"loss": before}]
    if make is build_group:
        wrong.append(before | {"accuracy": ExponentialMovingAverage(0.5).state_dict()})
    else:
        wrong.append({**before, "metrics": {"loss": {}}})
    for state in wrong:
        with pytest.raises(CheckpointError):
            other.load_state_dict(state)
    assert other.state_dict() == before
    other.reset()
    if make is build_group:
        assert other["loss"].num_updates == other["accuracy"].num_updates == 0
    else:
        assert other.averages == other.history == other.steps == {}


class Device:
    """A device that counts the reads of its values."""

    reads = 0

    def value(self, x: float) -> LazyFloat:
        def read() -> float:
            self.reads += 1
            return x

        return LazyFloat(read)


def test_lazy_float_acts_as_a_float_and_is_read_once() -> None:
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
    assert device.reads == 2  # one per lazy float
    assert (x.real, x.imag, x.item()) == (2.5, 0.0, 2.5)
    assert x.__torch_function__(divmod, (), (x, 2)) == (1.0, 0.5)
    assert type(pickle.loads(pickle.dumps(x))) is float


@pytest.mark.parametrize(
    "make", [lambda: SimpleMovingAverage(3), lambda: ExponentialMovingAverage()]
)
def test_device_values_are_read_on_access_or_when_too_many_wait(make: Any) -> None:
    device, average, plain = Device(), make(), make()
    x = np.random.default_rng(0).normal(size=40).tolist()
    found = []
    for i, value in enumerate(x):
        # Host numbers queue behind device numbers.
        found.append(average.update(device.value(value) if i % 3 else value, 1.0 + i % 2))
    assert device.reads == 0
    expected = [plain.update(value, 1.0 + i % 2) for i, value in enumerate(x)]
    assert found[20] == expected[20]
    assert device.reads == sum(1 for i in range(21) if i % 3)  # its own and the earlier ones
    assert found == expected
    assert device.reads == sum(1 for i in range(len(x)) if i % 3)
    assert average.state_dict() == plain.state_dict()
    device.reads = 0
    for _ in range(MAX_PENDING - 1):
        average.update(device.value(1.0))
    assert device.reads == 0
    average.update(device.value(4.0))
    assert device.reads == MAX_PENDING


def test_unreadable_value_raises_its_error_and_spoils_no_other() -> None:
    device, average = Device(), SimpleMovingAverage(9, on_nonfinite="raise")
    given: list[Any] = [device.value(x) for x in (1.0, math.nan, 3.0)]
    found = [average.update(x) for x in (*given, LazyFloat(lambda: 1 / 0))]
    found.append(average.update(1.0, device.value(-1.0)))
    with pytest.raises(NonFiniteError, match="nan"):
        _ = average.average
    average.reset()
    assert (found[0], found[2], average.num_updates) == (1.0, 2.0, 0)
    for place, error in ((1, NonFiniteError), (3, ZeroDivisionError), (4, ArgumentError)) * 2:
        with pytest.raises(error):
            float(found[place])
    smoother = MetricSmoother(2, None, record=True)
    for x in (1.0, LazyFloat(lambda: 1 / 0)):
        smoother.update({"loss": x})
    with pytest.raises(ZeroDivisionError):
        _ = smoother.averages
    assert math.isnan(smoother.averages["loss_raw"])
    assert smoother.update({"loss": 3.0}) == {"loss_raw": 3.0, "loss_sma": 2.0}
    np.testing.assert_equal(smoother.history["loss_sma"].tolist(), [1.0, math.nan, 2.0])
