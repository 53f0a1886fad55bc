"""``fastema.tensorflow`` beside ``tf.train.ExponentialMovingAverage``, and where that ends."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from fastema.errors import (
    ArgumentError,
    BridgeError,
    CheckpointError,
    DTypeError,
    LayoutError,
    StateError,
)
from fastema.plan import Plan
from fastema.tensorflow import ExponentialMovingAverage

from ..conftest import ROOT
from ..support import reference
from ..support.arrays import assert_same
from ..support.tolerance import unit_roundoff

NEEDS = ("keras",)


pytestmark = pytest.mark.tensorflow

SHAPES = [(), (0, 3), (1,), (7,), (5, 4), (3, 1, 2, 2), (300, 41)]
CODES = {"f16": tf.float16, "bf16": tf.bfloat16, "f32": tf.float32, "f64": tf.float64}
SCALE = 4.0  # no weight of these tests is larger

Way = Callable[[Callable[[], object]], Callable[[], object]]


def eagerly(work: Callable[[], object]) -> Callable[[], object]:
    return work


def traced(work: Callable[[], object]) -> Callable[[], object]:
    """The work as a function, which is not traced again at a later call."""
    traces: list[int] = []

    @tf.function
    def function() -> None:
        traces.append(1)
        assert len(traces) <= 2  # twice where it creates variables, says TensorFlow
        work()

    return function


@pytest.fixture(params=[eagerly, traced])
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def keras() -> Any:
    """Keras on TensorFlow. The backend is a matter of the process: see the last test."""
    import keras

    if keras.backend.backend() != "tensorflow":
        pytest.skip("run by test_what_needs_another_process")
    return keras


def drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-SCALE, SCALE, shape)


def variables(rng: np.random.Generator, code: str = "f32", shapes: Any = SHAPES) -> list[Any]:
    return [tf.Variable(tf.cast(drawn(rng, s), CODES[code]), name=f"v/{len(s)}") for s in shapes]


def move(rng: np.random.Generator, weights: list[Any]) -> None:
    for weight in weights:
        weight.assign(tf.cast(drawn(rng, tuple(weight.shape)), weight.dtype))


def values(weights: Any) -> list[np.ndarray]:
    """Copies, in float64."""
    return [np.array(weight.numpy(), np.float64) for weight in weights]


def stored(variable: Any) -> np.ndarray:
    """A copy as the reference wants it: bfloat16 as bits."""
    array = np.array(variable.numpy())
    return array.view(np.uint16) if variable.dtype == tf.bfloat16 else array


def assert_equal(got: Any, want: Any) -> None:
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def averages(ema: Any, weights: list[Any]) -> list[Any]:
    return [ema.average(weight) for weight in weights]


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("code", CODES)
def test_values_to_the_bit(code: str, rounding: str, way: Way, rng: np.random.Generator) -> None:
    weights = variables(rng, code)
    ema = ExponentialMovingAverage(0.97, rounding=rounding, seed=9)
    update = way(lambda: ema.apply(weights))
    names: dict[int, str] = {}
    for step in range(8):
        before = [stored(one) for one in (averages(ema, weights) if step else weights)]
        if step:
            move(rng, weights)
        update()
        names = names or {id(average): name for name, average in ema.shadow.items()}
        for old, weight in zip(before, weights, strict=True):
            average = ema.average(weight)
            words = None
            if rounding == "stochastic" and code in ("f16", "bf16"):
                key = reference.tensor_key(names[id(average)])
                words = reference.random_words(9, step, key, np.arange(old.size))
            want = reference.lerp(
                *(x.reshape(-1) for x in (old, stored(weight))), 1.0 - 0.97, code, code, words
            )
            assert_same(stored(average), want.reshape(old.shape), code)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_the_same_as_tensorflow(
    code: str, counted: bool, way: Way, rng: np.random.Generator
) -> None:
    """Fifty steps side by side, at a decay that float32 and bfloat16 hold exactly."""
    decay = 0.9375
    weights = variables(rng, code)
    count = tf.Variable(0, dtype=tf.int64) if counted else None
    ours = ExponentialMovingAverage(decay, count, rounding="nearest")
    theirs = tf.train.ExponentialMovingAverage(decay, count)
    update = way(lambda: ours.apply(weights))
    u = max(unit_roundoff(code), unit_roundoff("f32") if counted else 0.0)
    # Of theirs, five roundings a step, of numbers up to twice the scale: of the weight, of a
    # difference, of products and sums. What an error leaves behind shrinks by the decay.
    bound = 5 * u * 2 * SCALE / (1 - decay)
    moved = 0.0
    for step in range(50):
        if step:
            move(rng, weights)
        if count is not None:
            count.assign(3 * step)
        update()
        theirs.apply(weights)
        for weight in weights:
            got, want = values([ours.average(weight), theirs.average(weight)])
            np.testing.assert_allclose(got, want, rtol=0, atol=bound)
            assert ours.average(weight).dtype == weight.dtype
            moved = max(moved, float(np.abs(want - values([weight])[0]).max(initial=0)))
    assert moved > 20 * bound or code in ("f16", "bf16")


@pytest.mark.parametrize("kind", [float, tf.constant, tf.Variable, np.float64])
def test_every_kind_of_decay_and_count(kind: Any, way: Way, rng: np.random.Generator) -> None:
    weights = variables(rng, "f64")
    for decay, count in ((0.9, 5), (0.3, 5), (0.9, 0), (0.999, None)):
        ema = ExponentialMovingAverage(kind(decay), None if count is None else kind(float(count)))
        update = way(lambda ema=ema: ema.apply(weights))
        update()
        before = values(averages(ema, weights))
        move(rng, weights)
        update()
        d = float(ema._sources.decay)
        if count is not None:
            d = min(d, (1 + count) / (10 + count))
        assert d == pytest.approx(min(decay, 1 if count is None else (1 + count) / (10 + count)))
        for old, new, average in zip(before, values(weights), averages(ema, weights), strict=True):
            want = old + (1 - d) * (new - old)
            np.testing.assert_allclose(average.numpy(), want, rtol=0, atol=1e-14)


def test_variables_are_read_at_each_update(way: Way, rng: np.random.Generator) -> None:
    weights = variables(rng, "f64", [(4,)])
    decay, count = tf.Variable(0.5, dtype=tf.float64), tf.Variable(0)
    ema = ExponentialMovingAverage(decay, count)
    update = way(lambda: ema.apply(weights))
    update()
    for d, n in ((0.5, 1000), (0.875, 1000), (0.875, 2), (0.25, 2), (1.0, 10**6), (0.0, 7)):
        decay.assign(d)
        count.assign(n)
        (old,) = values(averages(ema, weights))
        move(rng, weights)
        update()
        want = old + (1 - min(d, (1 + n) / (10 + n))) * (weights[0].numpy() - old)
        np.testing.assert_allclose(ema.average(weights[0]).numpy(), want, rtol=0, atol=1e-14)


def test_keras_counters(way: Way, rng: np.random.Generator, keras: Any) -> None:
    optimizer = keras.optimizers.SGD()
    optimizer.iterations.assign(2)
    weights = variables(rng, "f64", [(3,)])
    ema = ExponentialMovingAverage(0.99, optimizer.iterations)
    update = way(lambda: ema.apply(weights))
    update()
    (old,) = values(averages(ema, weights))
    move(rng, weights)
    update()
    want = old + 0.75 * (weights[0].numpy() - old)
    np.testing.assert_allclose(ema.average(weights[0]).numpy(), want, rtol=0, atol=1e-14)


def test_a_small_weight_is_not_rounded() -> None:
    """At 0.999999 the weight of the new value is off by more than a per cent there."""
    weight = tf.Variable(np.zeros(50))
    ours = ExponentialMovingAverage(0.999999)
    theirs = tf.train.ExponentialMovingAverage(0.999999)
    ours.apply([weight])
    theirs.apply([weight])
    weight.assign(np.ones(50))
    ours.apply([weight])
    theirs.apply([weight])
    np.testing.assert_allclose(ours.average(weight).numpy(), 1e-6, rtol=1e-9)
    assert abs(theirs.average(weight).numpy()[0] / 1e-6 - 1) > 0.01


def test_an_average_in_bfloat16_moves() -> None:
    """Theirs stands still, as ours does to nearest; at random it moves as it should."""
    weight = tf.Variable(tf.ones([4000], tf.bfloat16))
    ours = ExponentialMovingAverage(0.999)
    nearest = ExponentialMovingAverage(0.999, rounding="nearest")
    theirs = tf.train.ExponentialMovingAverage(0.999)
    for ema in (ours, nearest, theirs):
        ema.apply([weight])
    weight.assign(2 * weight)
    for _ in range(100):
        for ema in (ours, nearest, theirs):
            ema.apply([weight])
    assert (theirs.average(weight).numpy() == 1).all()
    assert (nearest.average(weight).numpy() == 1).all()
    mean = float(np.mean(ours.average(weight).numpy().astype(np.float64)))
    assert mean == pytest.approx(2 - 0.999**100, abs=0.01)


# -- tensors --------------------------------------------------------------------------------------


def in_a_graph(decay: float, fed: list[np.ndarray], zero_debias: bool) -> list[np.ndarray]:
    """What TensorFlow 1 makes of a tensor, after each step."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float64, fed[0].shape)
        ema = tf.train.ExponentialMovingAverage(decay, zero_debias=zero_debias)
        update = ema.apply([x])
        average = ema.average(x)
        session.run(tf.compat.v1.global_variables_initializer())
        found = []
        for value in fed:
            session.run(update, {x: value})
            found.append(session.run(average))
        return found


@pytest.mark.parametrize("zero_debias", [False, True])
@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_tensors_as_in_a_graph(
    shape: tuple[int, ...], zero_debias: bool, way: Way, rng: np.random.Generator
) -> None:
    fed = [drawn(rng, shape) for _ in range(20)]
    want = in_a_graph(0.9375, fed, zero_debias)
    ema = ExponentialMovingAverage(0.9375, zero_debias=zero_debias)
    source = tf.Variable(fed[0])
    update = way(lambda: ema.apply({"loss": source + 0.0}))
    for value, expected in zip(fed, want, strict=True):
        source.assign(value)
        update()
        np.testing.assert_allclose(ema.average("loss").numpy(), expected, rtol=0, atol=1e-13)
    assert not ema.average("loss").trainable


def test_debiasing_while_the_decay_grows(way: Way, rng: np.random.Generator) -> None:
    """The average from zero, over the share of what was seen: 1 minus the product of the decays."""
    count, source = tf.Variable(0), tf.Variable(drawn(rng, (5,)))
    ema = ExponentialMovingAverage(0.99, count, zero_debias=True)
    update = way(lambda: ema.apply({"x": source * 1.0}))
    biased, left = np.zeros(5), 1.0
    for n in (0, 1, 4, 9, 100, 100_000):
        count.assign(n)
        source.assign(drawn(rng, (5,)))
        update()
        d = min(0.99, (1 + n) / (10 + n))
        biased, left = d * biased + (1 - d) * source.numpy(), left * d
        np.testing.assert_allclose(ema.average("x").numpy(), biased / (1 - left), atol=1e-14)
        if n == 0:
            np.testing.assert_array_equal(ema.average("x").numpy(), source.numpy())


def test_a_decay_of_one_takes_nothing_in() -> None:
    ema = ExponentialMovingAverage(1.0, zero_debias=True)
    weight = tf.Variable([3.0])
    for value in (2.0, 5.0):
        ema.apply({"x": tf.constant([value]), "w": weight})
        weight.assign([value])
        assert ema.average("x").numpy() == [value]
        assert ema.average("w").numpy() == [3.0]


def test_variables_are_not_debiased(rng: np.random.Generator) -> None:
    """As with TensorFlow: their averages do not begin at zero."""
    weights = variables(rng)
    plain, debiased = ExponentialMovingAverage(0.9), ExponentialMovingAverage(0.9, zero_debias=True)
    for _ in range(3):
        plain.apply(weights)
        debiased.apply(weights)
        move(rng, weights)
    assert_equal(values(averages(plain, weights)), values(averages(debiased, weights)))


def test_tensors_and_variables_together(way: Way, rng: np.random.Generator) -> None:
    (weight,) = variables(rng, "f64", [(4,)])
    ema = ExponentialMovingAverage(0.5)
    update = way(lambda: ema.apply({"norm": tf.reduce_sum(weight**2), "w": weight}))
    update()
    first = weight.numpy().copy()
    move(rng, [weight])
    update()
    want = 0.25 * (first**2).sum() + 0.5 * (weight.numpy() ** 2).sum()
    np.testing.assert_allclose(ema.average("norm").numpy(), want, rtol=1e-14)
    np.testing.assert_allclose(ema.average(weight).numpy(), (first + weight.numpy()) / 2)
    assert list(ema.shadow) == ["w", "norm"]


def mixed(rng: np.random.Generator, count: int) -> list[Any]:
    """Variables of several dtypes, with rows and without."""
    shapes = [(5,), (2, 3), (), (3, 1, 2), (0, 4)]
    codes = ("f32", "f64", "f32")
    return [variables(rng, codes[i % 3], [shapes[i % 5]])[0] for i in range(count)]


def test_many_variables_are_averaged_and_what_was_read_before_stays(
    way: Way, rng: np.random.Generator
) -> None:
    weights, ema = mixed(rng, 150), ExponentialMovingAverage(0.75)
    update = way(lambda: ema.apply(weights))
    want, held = values(weights), []
    for step in range(6):
        if step:
            move(rng, weights)
        update()
        now = values(weights)
        if step:
            want = [old + 0.25 * (new - old) for old, new in zip(want, now, strict=True)]
        got = averages(ema, weights)
        for one, exact in zip(values(got), want, strict=True):
            np.testing.assert_allclose(one, exact, rtol=0, atol=(step + 1) * SCALE * 2**-22)
        held.append(([one.value() for one in got], values(got)))  # tensors of the same memory
    for tensors, known in held:
        assert_equal(values(tensors), known)


def test_the_third_apply_traces_nothing_that_grows_with_the_variables(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]
    read = tf.raw_ops.ReadVariableOp

    def counted(**arguments: Any) -> Any:
        calls[0] += 1
        return read(**arguments)

    monkeypatch.setattr(tf.raw_ops, "ReadVariableOp", counted)
    found = {}
    for count in (40, 128, 512):  # the first one may trace
        weights, ema = variables(rng, "f32", [(3, 2)] * count), ExponentialMovingAverage(0.75)
        for _ in range(2):
            ema.apply(weights)
        calls[0] = 0
        for _ in range(3):
            ema.apply(weights)
        found[count] = calls[0]
    assert found[512] == found[128] < 128


# -- order and memory -----------------------------------------------------------------------------

LARGE = 300_000  # of which an update takes long enough for a race to show


def test_order_within_a_function(rng: np.random.Generator) -> None:
    weight = tf.Variable(drawn(rng, (LARGE,)))
    ema = ExponentialMovingAverage(0.75)
    ema.apply([weight])
    start = weight.numpy().copy()

    @tf.function
    def function(first: Any, second: Any) -> tuple[Any, ...]:
        average = ema.average(weight)
        before = average + 0.0  # computed there and then, where a value read may come later
        weight.assign(first)
        ema.apply([weight])
        between = average + 0.0
        weight.assign_add(second)
        ema.apply([weight])
        after = average + 0.0
        weight.assign(first)
        return before, between, after

    for _ in range(5):
        first, second = drawn(rng, (LARGE,)), drawn(rng, (LARGE,))
        before, between, after = function(first, second)
        np.testing.assert_array_equal(before, start)
        middle = 0.75 * start + 0.25 * first
        np.testing.assert_allclose(between, middle, rtol=0, atol=1e-14)
        start = 0.75 * middle + 0.25 * (first + second)
        np.testing.assert_allclose(after, start, rtol=0, atol=1e-14)
        start = after.numpy()
        np.testing.assert_array_equal(ema.average(weight).numpy(), start)
        np.testing.assert_array_equal(weight.numpy(), first)


def test_order_in_a_loop_and_a_branch(rng: np.random.Generator) -> None:
    weight = tf.Variable(drawn(rng, (LARGE,)))
    ema = ExponentialMovingAverage(0.5)
    ema.apply([weight])
    want, value = weight.numpy().copy(), weight.numpy().copy()

    @tf.function
    def function(steps: Any) -> Any:
        for i in tf.range(steps):
            weight.assign_add(tf.ones([LARGE], tf.float64))
            if i % 2 == 0:
                ema.apply([weight])
            else:
                weight.assign(weight * 0.5)
        return ema.average(weight).read_value()

    for steps in (5, 0, 4):
        got = function(tf.constant(steps))
        for i in range(steps):
            value = value + 1
            if i % 2 == 0:
                want = want + 0.5 * (value - want)
            else:
                value = value * 0.5
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_averages_that_begin_in_a_loop(rng: np.random.Generator) -> None:
    weight = tf.Variable(drawn(rng, (5,)))
    ema = ExponentialMovingAverage(0.5)
    first = weight.numpy().copy()

    @tf.function
    def function() -> None:
        for _ in tf.range(3):
            weight.assign_add(tf.ones([5], tf.float64))
            ema.apply({"w": weight, "twice": 2 * weight})

    function()
    # By hand: 0.5 * 3 + 0.25 * 2 + 0.125 * 1 of what was added, and as much of the beginning.
    np.testing.assert_allclose(ema.average(weight).numpy(), first + 2.125, atol=1e-14)
    want = 2 * (0.875 * first + 2.125)
    np.testing.assert_allclose(ema.average("twice").numpy(), want, atol=1e-14)


def test_several_functions_and_eager_calls(rng: np.random.Generator) -> None:
    weights = variables(rng, "f64", [(9,), (2, 2)])
    ema = ExponentialMovingAverage(0.5)
    calls = [
        traced(lambda: ema.apply(weights)),
        traced(lambda: ema.apply(weights[:1])),
        lambda: ema.apply(weights),
        lambda: ema.apply(weights[1:]),
        ema.apply,
    ]
    which = [(0, 1), (0,), (0, 1), (1,), (0, 1)]
    ema.apply(weights)
    want = values(weights)
    for number in rng.integers(0, len(calls), 40):
        move(rng, weights)
        calls[number]()
        now = values(weights)
        for i in which[number]:
            want[i] = want[i] + 0.5 * (now[i] - want[i])
        for got, expected in zip(values(averages(ema, weights)), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


def test_two_averages_of_one_variable(rng: np.random.Generator) -> None:
    weights = variables(rng, "f64", [(LARGE,)])
    slow, fast = ExponentialMovingAverage(0.75, name="slow"), ExponentialMovingAverage(0.25)

    @tf.function
    def function(x: Any) -> None:
        slow.apply(weights)
        weights[0].assign(x)
        fast.apply(weights)
        slow.apply(weights)

    want = np.repeat(values(weights), 2, 0)
    for _ in range(3):
        x, before = drawn(rng, (LARGE,)), values(weights)[0]
        function(x)
        want[0] = 0.75 * (0.75 * want[0] + 0.25 * before) + 0.25 * x
        want[1] = 0.25 * want[1] + 0.75 * x
        np.testing.assert_allclose(slow.average(weights[0]).numpy(), want[0], atol=1e-13)
        np.testing.assert_allclose(fast.average(weights[0]).numpy(), want[1], atol=1e-13)


def test_values_that_are_held_do_not_change(way: Way, rng: np.random.Generator) -> None:
    weights = variables(rng)
    ema = ExponentialMovingAverage(0.5)
    update = way(lambda: ema.apply(weights))
    update()
    for _ in range(4):
        held = [average.read_value() for average in averages(ema, weights)]
        kept = [tensor.numpy().copy() for tensor in held]
        move(rng, weights)
        update()
        assert_equal(held, kept)
        assert (ema.average(weights[-1]).numpy() != kept[-1]).any()


def test_an_update_in_place_stays_there(way: Way, rng: np.random.Generator) -> None:
    """No copies: the memory of an average is the same from step to step."""
    weights = variables(rng, "f32", [(LARGE,)])
    ema = ExponentialMovingAverage(0.5)
    update = way(lambda: ema.apply(weights))

    def address() -> int:
        return int(np.from_dlpack(ema.average(weights[0]).value()).ctypes.data)

    update()
    update()
    first = address()
    for _ in range(5):
        move(rng, weights)
        update()
        assert address() == first


def test_an_update_is_prepared_once(rng: np.random.Generator, monkeypatch: Any) -> None:
    made = []

    class Counted(Plan):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(1)
            super().__init__(*args, **options)

    monkeypatch.setattr("fastema.tensorflow.average.Plan", Counted)
    weights = variables(rng)
    ema = ExponentialMovingAverage(0.5)
    made.clear()
    for _ in range(4):
        ema.apply(list(weights))
    assert len(made) == 1
    more = variables(rng)
    for _ in range(3):
        ema.apply(weights + more)
    assert len(made) == 2
    assert len(ema.shadow) == 2 * len(weights)


def test_an_outer_tape_changes_nothing(way: Way, rng: np.random.Generator) -> None:
    (weight,) = weights = variables(rng, "f64", [(4,)])
    ema = ExponentialMovingAverage(0.5)
    update = way(lambda: ema.apply(weights))
    x = tf.constant(drawn(rng, (4,)))
    update()
    want = weight.numpy().copy()
    for _ in range(3):
        move(rng, weights)
        with tf.GradientTape() as tape:
            update()
            loss = tf.reduce_sum(weight * x)
        np.testing.assert_array_equal(tape.gradient(loss, weight), x)
        want = want + 0.5 * (weight.numpy() - want)
        np.testing.assert_allclose(ema.average(weight).numpy(), want, atol=1e-14)


# -- names ----------------------------------------------------------------------------------------


def test_names_as_tensorflow_gives_them() -> None:
    weights = [
        tf.Variable([1.0, 2.0], name="a/w"),
        tf.Variable(1.0, name="w"),
        tf.Variable([2.0]),
        tf.Variable(5.0, name="w"),
    ]
    ours = ExponentialMovingAverage(0.9, name="slow_one")
    theirs = tf.train.ExponentialMovingAverage(0.9, name="slow_one")
    assert ours.name == theirs.name
    for ema in (ours, theirs):
        assert ema.average(weights[0]) is None
    names = [ours.average_name(weight) for weight in weights[:3]]
    assert names == [theirs.average_name(weight) for weight in weights[:3]]
    with tf.name_scope("elsewhere"):
        ours.apply(weights)
        theirs.apply(weights)
    assert [ours.average_name(w) for w in weights] == [theirs.average_name(w) for w in weights]
    assert [ours.average(w).name for w in weights] == [theirs.average(w).name for w in weights]
    found = ours.variables_to_restore(weights)
    assert found == theirs.variables_to_restore(weights)
    assert ours.variables_to_restore() == found
    assert len(found) == 4
    assert ours.average_name("loss") == "loss/slow_one"


def test_names_in_a_checkpoint() -> None:
    weights = [tf.Variable(float(i), name=name) for i, name in enumerate(("w", "b", "w", "w"))]
    ema = ExponentialMovingAverage(0.9)
    ema.apply(weights)
    assert list(ema.shadow) == ["w", "b", "w#1", "w#2"]
    ema.apply({"mine": tf.Variable(1.0), "w#3": tf.Variable(2.0)})
    ema.apply([tf.Variable(7.0, name="w")])
    assert list(ema.shadow) == ["w", "b", "w#1", "w#2", "mine", "w#3", "w#4"]
    assert [average.numpy() for average in ema.shadow.values()] == [0, 1, 2, 3, 1, 2, 7]
    assert ema.average("mine").numpy() == 1


def dense(keras: Any, count: int = 3) -> Any:
    layers = [keras.layers.Dense(4, use_bias=False) for _ in range(count)]
    model = keras.Sequential([*layers, keras.layers.Dense(2, name="out_1")])
    model.build((None, 4))
    return model


def test_keras_names_do_not_depend_on_other_layers(rng: np.random.Generator, keras: Any) -> None:
    first = dense(keras)
    keras.layers.Dense(3)
    second, third = dense(keras), dense(keras, 12)
    assert first.weights[0].path != second.weights[0].path
    found = []
    for model in (first, second):
        ema = ExponentialMovingAverage(0.9)
        ema.apply(model.trainable_variables)
        found.append([(n, tuple(a.shape)) for n, a in ema.shadow.items()])
    assert found[0] == found[1]
    # The order of a list does not matter, and the tenth layer comes after the second.
    straight, shuffled = ExponentialMovingAverage(0.9), ExponentialMovingAverage(0.9)
    straight.apply(third.trainable_variables)
    given = list(third.trainable_variables)
    rng.shuffle(given)
    shuffled.apply(given)
    for name, average in straight.shadow.items():
        np.testing.assert_array_equal(average.numpy(), shuffled.shadow[name].numpy())
    kernels = third.weights[:12]
    names = ["sequential/dense/kernel", *(f"sequential/dense/kernel#{i}" for i in range(1, 12))]
    for kernel, name in zip(kernels, names, strict=True):
        assert straight.average(kernel) is straight.shadow[name]


# -- checkpoints ----------------------------------------------------------------------------------


class Trained(tf.Module):
    """A model that averages its own weights, and a loss."""

    def __init__(self, rng: np.random.Generator, code: str = "f32", names: str = "") -> None:
        super().__init__()
        self.weights = variables(rng, code)
        self.count = tf.Variable(0, dtype=tf.int64)
        self.ema = ExponentialMovingAverage(0.99, self.count, zero_debias=True, seed=3)

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64)])
    def step(self, seed: Any) -> None:
        self.count.assign_add(1)
        for i, weight in enumerate(self.weights):
            noise = tf.random.stateless_uniform(weight.shape, [seed, i], -SCALE, SCALE)
            weight.assign(tf.cast(noise, weight.dtype))
        self.ema.apply(self.weights)
        self.ema.apply({"loss": tf.reduce_sum([tf.reduce_sum(w) for w in self.weights])})

    @tf.function(input_signature=[])
    def total(self) -> Any:
        return tf.reduce_sum([tf.reduce_sum(tf.cast(w, tf.float64)) for w in self.weights])

    def train(self, first: int, last: int) -> Trained:
        for step in range(first, last):
            self.step(tf.constant(step, tf.int64))
        return self

    def state(self) -> dict[str, np.ndarray]:
        return {name: stored(average) for name, average in self.ema.shadow.items()}


def assert_states_equal(got: Trained, want: Trained) -> None:
    assert got.state().keys() == want.state().keys()
    for name, value in want.state().items():
        np.testing.assert_array_equal(got.state()[name], value, err_msg=name)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("code", ["f32", "bf16"])
def test_a_resumed_run_goes_on_to_the_bit(
    code: str, before: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Random rounding, debiasing and all, restored before the averages exist or after."""
    whole = Trained(rng, code).train(0, 4)
    path = tf.train.Checkpoint(model=whole).save(tmp_path / "half")
    whole.train(4, 9)
    resumed = Trained(rng, code)
    if not before:
        resumed.train(50, 52)
    status = tf.train.Checkpoint(model=resumed).restore(path)
    if before:
        with pytest.raises(AssertionError, match="shadow"):
            status.assert_consumed()
    resumed.train(4, 5)
    status.assert_consumed()
    resumed.train(5, 9)
    assert_states_equal(resumed, whole)


def test_only_the_averages(rng: np.random.Generator, tmp_path: Path) -> None:
    weights = variables(rng)
    ema = ExponentialMovingAverage(0.9)
    ema.apply(weights)
    move(rng, weights)
    ema.apply(weights)
    path = tf.train.Checkpoint(ema=ema).write(tmp_path / "averages")
    names = {name for name, _ in tf.train.list_variables(path) if "/shadow/" in name}
    assert len(names) == len(weights)
    assert "ema/shadow/v.S2#1/.ATTRIBUTES/VARIABLE_VALUE" in names
    want = values(averages(ema, weights))
    move(rng, weights)
    ema.apply(weights)
    tf.train.Checkpoint(ema=ema).read(path).assert_consumed()
    assert_equal(values(averages(ema, weights)), want)
    # A fresh one, of which the first update is already one of the restored averages.
    other = ExponentialMovingAverage(0.75)
    status = tf.train.Checkpoint(ema=other).read(path)
    other.apply(weights)
    status.assert_consumed()
    for weight, old in zip(weights, want, strict=True):
        expected = old + 0.25 * (values([weight])[0] - old)
        np.testing.assert_allclose(values([other.average(weight)])[0], expected, atol=1e-6)


def test_what_a_checkpoint_lacks_is_reported(rng: np.random.Generator, tmp_path: Path) -> None:
    weights = variables(rng)
    ema, more = ExponentialMovingAverage(0.9), ExponentialMovingAverage(0.9)
    ema.apply(weights[:-1])
    path = tf.train.Checkpoint(ema=ema).write(tmp_path / "fewer")
    more.apply(weights)
    with pytest.raises(AssertionError, match=r"v/2"):
        tf.train.Checkpoint(ema=more).read(path).assert_existing_objects_matched()
    assert_equal(values(averages(more, weights[:-1])), values(averages(ema, weights[:-1])))
    fewer = ExponentialMovingAverage(0.9)
    fewer.apply(weights[:2])
    with pytest.raises(AssertionError, match="shadow"):
        tf.train.Checkpoint(ema=fewer).read(path).assert_consumed()


def test_a_record_that_cannot_be_read() -> None:
    ema = ExponentialMovingAverage(0.9)
    for text in (b"", b"[]", b"{}", b'{"remaining": {"x": []}, "steps": {}}'):
        with pytest.raises(CheckpointError, match="cannot be read"):
            ema._state.deserialize(text)


ELSEWHERE = """
    import os, sys
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import numpy as np
    import tensorflow as tf
    tf.config.threading.set_inter_op_parallelism_threads(1)
    from fastema.tensorflow import ExponentialMovingAverage
    unrelated = [tf.Variable(float(i), name="v/1") for i in range(3)]
    ExponentialMovingAverage(0.5).apply(unrelated)
    folder, exported = sys.argv[1:]
    weights = [tf.Variable(np.zeros(s), name=f"v/{len(s)}") for s in [(5,), (2, 3), (4,)]]
    ema = ExponentialMovingAverage(0.75)
    status = tf.train.Checkpoint(weights=weights, ema=ema).restore(folder)

    @tf.function
    def update():
        ema.apply(weights)

    update()
    status.assert_consumed()
    for weight in weights:
        print(ema.average(weight).numpy().tolist())
    loaded = tf.saved_model.load(exported)
    print(float(loaded.total()))
    print(sum(float(tf.reduce_sum(a)) for a in loaded.ema.shadow.values()))
    try:
        loaded.step(tf.constant(1, tf.int64))
    except tf.errors.InvalidArgumentError as error:
        print("callback" in str(error))
"""


@pytest.mark.slow
def test_another_process(rng: np.random.Generator, tmp_path: Path, python: Any) -> None:
    """With other variables of the same names before, and one thread for a graph's operations."""
    weights = [tf.Variable(drawn(rng, s), name=f"v/{len(s)}") for s in [(5,), (2, 3), (4,)]]
    ema = ExponentialMovingAverage(0.75)
    ema.apply(weights)
    old = values(weights)
    move(rng, weights)
    ema.apply(weights)
    path = tf.train.Checkpoint(weights=weights, ema=ema).save(tmp_path / "saved")
    model = Trained(rng).train(0, 3)
    tf.saved_model.save(model, tmp_path / "exported")
    lines = python(ELSEWHERE, path, str(tmp_path / "exported"), quiet=False).splitlines()
    for line, first, weight in zip(lines[:3], old, weights, strict=True):
        once = first + 0.25 * (weight.numpy() - first)
        want = once + 0.25 * (weight.numpy() - once)
        np.testing.assert_allclose(np.array(eval(line)), want, atol=1e-14)
    assert float(lines[3]) == pytest.approx(float(model.total()))
    total = sum(float(tf.reduce_sum(average)) for average in model.ema.shadow.values())
    assert float(lines[4]) == pytest.approx(total)
    assert lines[5] == "True"


def test_it_is_a_module(rng: np.random.Generator) -> None:
    model = Trained(rng).train(0, 2)
    shown = {v.ref() for v in model.variables}
    assert {average.ref() for average in model.ema.shadow.values()} <= shown
    assert len(model.trainable_variables) == len(model.weights) + 1
    assert model.ema in model.submodules


def test_a_copied_model_averages_its_own_weights(rng: np.random.Generator) -> None:
    class Model(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = variables(rng, "f64")
            self.ema = ExponentialMovingAverage(0.5)

    model = Model()
    model.ema.apply(model.weights)
    other = copy.deepcopy(model)
    before = values(model.ema.shadow.values())
    move(rng, other.weights)
    other.ema.apply(other.weights)
    assert_equal(values(model.ema.shadow.values()), before)
    for old, new, weight in zip(before, model.weights, other.weights, strict=True):
        assert other.ema.average(new) is None
        got = other.ema.average(weight).numpy()
        np.testing.assert_allclose(got, (old + weight.numpy()) / 2, atol=1e-14)


# -- swapped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_a_swap_is_exact(code: str, rng: np.random.Generator) -> None:
    weights = variables(rng, code)
    ema = ExponentialMovingAverage(0.9)
    for _ in range(3):
        ema.apply(weights)
        move(rng, weights)
    raw, mean = [stored(w) for w in weights], [stored(a) for a in averages(ema, weights)]
    held = [weight.read_value() for weight in weights]
    for _ in range(2):
        with ema.swapped():
            assert_equal([stored(w) for w in weights], mean)
            assert_equal([stored(a) for a in averages(ema, weights)], raw)
        assert_equal([stored(w) for w in weights], raw)
        assert_equal([stored(a) for a in averages(ema, weights)], mean)
    assert_equal([tensor.numpy().tobytes() for tensor in held], [a.tobytes() for a in raw])
    ema.apply(weights)


def test_a_swap_of_some(rng: np.random.Generator) -> None:
    weights = variables(rng)
    ema = ExponentialMovingAverage(0.9)
    ema.apply(weights)
    move(rng, weights)
    raw, mean = values(weights), values(averages(ema, weights))
    with ema.swapped(weights[3:5]):
        assert_equal(values(weights), raw[:3] + mean[3:5] + raw[5:])
    assert_equal(values(weights), raw)
    strange = ema.swapped([weights[0], tf.Variable(1.0, name="stranger")])
    with pytest.raises(ArgumentError, match="no average"), strange:
        pass
    assert_equal(values(weights), raw)


def test_a_swap_is_taken_back_after_an_error(rng: np.random.Generator, tmp_path: Path) -> None:
    weights = variables(rng)
    ema = ExponentialMovingAverage(0.9)
    checkpoint = tf.train.Checkpoint(ema=ema)
    ema.apply(weights)
    path = checkpoint.save(tmp_path / "c")
    update = traced(lambda: ema.apply(weights))
    update()
    move(rng, weights)
    raw, mean = values(weights), values(averages(ema, weights))

    def inside() -> Iterator[Any]:
        yield lambda: ema.apply(weights)
        yield lambda: ema.apply([tf.Variable(1.0)])
        yield update
        yield lambda: checkpoint.save(tmp_path / "d")
        yield lambda: checkpoint.restore(path)
        yield lambda: ema.swapped().__enter__()

    for refused in inside():
        kinds = (StateError, tf.errors.UnknownError)
        with pytest.raises(kinds, match=r"swapped\(\)"), ema.swapped():
            refused()
        assert_equal(values(weights), raw)
        assert_equal(values(averages(ema, weights)), mean)
    assert len(ema.shadow) == len(weights)


def test_a_swap_back_that_fails_is_done_by_the_next_call(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = variables(rng)
    ema = ExponentialMovingAverage(0.9)
    ema.apply(weights)
    move(rng, weights)
    raw, mean = values(weights), values(averages(ema, weights))
    swap, fails = Plan.swap_, [False, True]

    def failing(plan: Plan) -> None:
        if fails and fails.pop(0):
            raise OSError("busy")
        swap(plan)

    monkeypatch.setattr(Plan, "swap_", failing)
    with pytest.raises(OSError, match="busy"), ema.swapped():
        pass
    assert_equal(values(weights), mean)
    with ema.swapped():
        assert_equal(values(weights), mean)
    assert_equal(values(weights), raw)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """In the background an interrupt is ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_of_a_swap_leaves_the_weights(rng: np.random.Generator) -> None:
    weights = variables(rng)
    ema = ExponentialMovingAverage(0.9)
    ema.apply(weights)
    move(rng, weights)
    raw = values(weights)
    for when in (0, 1):
        with ema.swapped():
            pass
        plan = ema._plan(ema._entry(weights))
        swap, calls = plan.swap_, []

        def interrupted(swap: Any = swap, calls: list[int] = calls, when: int = when) -> None:
            calls.append(1)
            swap()
            if len(calls) == when + 1:
                signal.raise_signal(signal.SIGINT)

        plan.swap_ = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt), ema.swapped():
            assert when == 1
        del plan.swap_
        assert len(calls) == 2
        assert_equal(values(weights), raw)
        ema.apply(weights)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan"), "0.9x", None])
def test_decays_that_are_none(decay: Any) -> None:
    with pytest.raises(ArgumentError, match="decay"):
        ExponentialMovingAverage(decay)
    with pytest.raises(ArgumentError, match="num_updates"):
        ExponentialMovingAverage(0.9, -1)


def test_options_that_are_none() -> None:
    for options in ({"rounding": "up"}, {"seed": -1}, {"name": ""}, {"name": 3}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            ExponentialMovingAverage(0.9, **options)
    for source in (tf.Variable([1.0, 2.0]), tf.Variable("x"), tf.constant([0.9])):
        with pytest.raises(ArgumentError, match="scalar"):
            ExponentialMovingAverage(source)


def test_numbers_that_become_wrong(way: Way, rng: np.random.Generator) -> None:
    weights = variables(rng)
    decay, count = tf.Variable(0.5), tf.Variable(0)
    ema = ExponentialMovingAverage(decay, count)
    update = way(lambda: ema.apply(weights))
    update()
    before = values(averages(ema, weights))
    move(rng, weights)
    for variable, wrong, right in ((decay, 2.0, 0.5), (decay, np.nan, 0.5), (count, -10, 0)):
        variable.assign(wrong)
        with pytest.raises((ArgumentError, tf.errors.InvalidArgumentError), match="expected a fin"):
            update()
        variable.assign(right)
        assert_equal(values(averages(ema, weights)), before)
    update()
    assert (values(averages(ema, weights))[-1] != before[-1]).any()


def refused() -> Iterator[tuple[str, type[Exception], str, Callable[[], Any]]]:
    yield "no list", BridgeError, "list of variables", lambda: tf.Variable([1.0])
    yield "a tensor", BridgeError, "list of variables", lambda: tf.constant([1.0])
    yield "a module", BridgeError, "list of variables", lambda: tf.Module()
    yield "a number", BridgeError, "list of variables", lambda: 3
    yield "tensors", BridgeError, "needs a name", lambda: [tf.constant(1.0)]
    yield "arrays", BridgeError, "ndarray", lambda: [np.ones(2)]
    yield "an array", BridgeError, "ndarray", lambda: {"a": np.ones(2)}
    yield "integers", DTypeError, "'n' is int32", lambda: [tf.Variable(1, name="n")]
    yield "complex", DTypeError, "complex64", lambda: [tf.Variable(1j, dtype=tf.complex64)]
    yield "an integer", DTypeError, "int32", lambda: {"n": tf.constant(1)}
    yield "no name", ArgumentError, "no name", lambda: {3: tf.Variable(1.0)}
    yield "empty name", ArgumentError, "no name", lambda: {"": tf.constant(1.0)}
    yield "taken", ArgumentError, "another average", lambda: {"w": tf.Variable(1.0)}
    yield "taken too", ArgumentError, "variable's average", lambda: {"w": tf.constant(1.0)}
    yield "shape", LayoutError, r"\(2,\)", lambda: {"loss": tf.constant([1.0, 2.0])}
    yield "dtype", LayoutError, "float64", lambda: {"loss": tf.constant(1.0, tf.float64)}


@pytest.mark.parametrize(
    ("error", "words", "given"), [pytest.param(*rest, id=name) for name, *rest in refused()]
)
def test_lists_that_are_refused(error: type[Exception], words: str, given: Any, way: Way) -> None:
    """Before anything is created or written, also of what stands before it in the list."""
    weight = tf.Variable([1.0, 2.0], name="w")
    ema = ExponentialMovingAverage(0.5)
    ema.apply({"w": weight, "loss": tf.constant(4.0)})
    weight.assign([5.0, 6.0])
    wrong = given()
    if isinstance(wrong, list):
        wrong = [weight, tf.Variable(3.0, name="fresh"), *wrong]
    elif isinstance(wrong, dict):
        wrong = {"w": weight, "fresh": tf.Variable(3.0)} | wrong
    # Errors while a function is traced are of a class of TensorFlow's.
    kinds = error if way is eagerly else Exception
    with pytest.raises(kinds, match=words):
        way(lambda: ema.apply(wrong))()
    assert list(ema.shadow) == ["w", "loss"]
    assert ema.average(weight).numpy().tolist() == [1.0, 2.0]
    assert ema.average("loss").numpy() == 2.0


def test_a_second_name_is_refused() -> None:
    weight = tf.Variable(1.0)
    ema = ExponentialMovingAverage(0.5)
    ema.apply({"w": weight})
    ema.apply([weight])
    with pytest.raises(ArgumentError, match="already"):
        ema.apply({"v": weight})
    other = tf.Variable(1.0)
    with pytest.raises(ArgumentError, match="several names"):
        ema.apply({"a": other, "b": other})
    assert list(ema.shadow) == ["w"]


def test_without_a_list(way: Way) -> None:
    ema = ExponentialMovingAverage(0.5)
    with pytest.raises(StateError, match="no variables"):
        ema.apply()
    with pytest.raises(StateError, match="no variables"), ema.swapped():
        pass
    way(lambda: ema.apply([]))()
    way(lambda: ema.apply({}))()
    assert ema.average("x") is None
    with pytest.raises(BridgeError, match="cannot average"):
        ema.average(3)


def test_a_variable_twice_is_updated_once() -> None:
    weight = tf.Variable(1.0)
    ema = ExponentialMovingAverage(0.5)
    ema.apply([weight, weight])
    weight.assign(3.0)
    ema.apply([weight, weight])
    assert ema.average(weight).numpy() == 2.0


def test_where_it_cannot_work() -> None:
    weight = tf.Variable([1.0, 2.0])
    ema = ExponentialMovingAverage(0.5)
    ema.apply([weight])

    @tf.function(jit_compile=True)
    def compiled(x: Any) -> Any:
        ema.apply([weight])
        return x

    @tf.function
    def nested(x: Any) -> Any:
        return compiled(x)

    for function in (compiled, nested):
        with pytest.raises(Exception, match="XLA cannot call the kernel"):
            function(tf.constant(1.0))
    with tf.Graph().as_default(), pytest.raises(BridgeError, match="TensorFlow 1"):
        ema.apply([weight])

    @tf.function
    def swapping() -> None:
        with ema.swapped():
            pass

    with pytest.raises(Exception, match="around the call"):
        swapping()

    class Late(tf.Module):
        weight = None

        @tf.function
        def __call__(self) -> None:
            if self.weight is None:
                self.weight = tf.Variable(3.0, name="late")
            ema.apply([self.weight])

    with pytest.raises(Exception, match=r"no.* yet:\s+- 'late'"):
        Late()()
    assert len(ema.shadow) == 1


def test_replicas_are_refused_by_name() -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    ema = ExponentialMovingAverage(0.5)
    weight = tf.Variable(1.0)
    with strategy.scope():
        mirrored = tf.Variable(1.0, name="mirrored")
        with pytest.raises(BridgeError, match="MirroredStrategy"):
            ema.apply([weight])
    with pytest.raises(BridgeError, match=r"'mirrored' is a MirroredVariable"):
        ema.apply([weight, mirrored])
    with pytest.raises(BridgeError, match="MirroredStrategy"):
        strategy.run(lambda: ema.apply([weight]))
    assert not ema.shadow


# -- Keras ----------------------------------------------------------------------------------------


def test_in_a_keras_model_that_is_fitted(
    rng: np.random.Generator, tmp_path: Path, keras: Any
) -> None:
    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(2)
            self.seen: list[Any] = []

        def call(self, x: Any) -> Any:
            return self.dense(x)

        def train_step(self, data: Any) -> Any:
            logs = super().train_step(data)
            self.ema.apply(self.trainable_variables)
            return logs

    class Follow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            now = self.model.dense.kernel.numpy().astype(np.float64)
            seen.append(seen[-1] + 0.25 * (now - seen[-1]))

    x = drawn(rng, (40, 3)).astype(np.float32)
    model = Model()
    model.ema = ExponentialMovingAverage(0.75)
    model(x)
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=False)
    seen = [model.dense.kernel.numpy().astype(np.float64)]
    model.ema.apply(model.trainable_variables)
    model.fit(x, x[:, :2], batch_size=8, epochs=3, verbose=0, callbacks=[Follow()])
    assert len(seen) == 16
    average = model.ema.average(model.dense.kernel)
    assert average is model.ema.average(model.dense.kernel.value)
    np.testing.assert_allclose(average.numpy(), seen[-1], atol=1e-6)
    assert np.abs(seen[-1] - model.dense.kernel.numpy()).max() > 1e-4
    path = tf.train.Checkpoint(model).save(tmp_path / "keras")
    other = Model()
    other.ema = ExponentialMovingAverage(0.75)
    other(x)
    tf.train.Checkpoint(other).restore(path).expect_partial()
    other.ema.apply(other.trainable_variables)
    want = 0.75 * average.numpy() + 0.25 * other.dense.kernel.numpy()
    np.testing.assert_allclose(other.ema.average(other.dense.kernel).numpy(), want, atol=1e-6)


@pytest.mark.slow
def test_what_needs_another_process() -> None:
    """The tests that take the fixture `keras`, on its TensorFlow backend."""
    file = Path(__file__)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "keras", str(file)],
        env={**os.environ, "KERAS_BACKEND": "tensorflow", "PYTHONPATH": path},
        cwd=file.parents[1],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert "skipped" not in done.stdout
