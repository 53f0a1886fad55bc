"""Values of ``fastema.tensorflow`` beside those of ``tf.train``, and their order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from fastema.plan import Plan
from fastema.tensorflow import ExponentialMovingAverage

from ..support import reference
from ..support.arrays import assert_same
from ..support.tolerance import unit_roundoff
from .variables import CODES, LARGE, SCALE, Rng, averaged, drawn, move, stored, values, variables
from .ways import Way, assert_equal, assert_moves, averages, traced

pytestmark = pytest.mark.tensorflow


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("code", CODES)
def test_values_to_the_bit(code: str, rounding: str, way: Way, rng: Rng) -> None:
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
def test_the_same_as_tensorflow(code: str, counted: bool, way: Way, rng: Rng) -> None:
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
def test_every_kind_of_decay_and_count(kind: Any, way: Way, rng: Rng) -> None:
    weights = variables(rng, "f64")
    for decay, count in ((0.9, 5), (0.3, 5), (0.9, 0), (0.999, None)):
        ema = ExponentialMovingAverage(kind(decay), None if count is None else kind(float(count)))
        update = way(lambda ema=ema: ema.apply(weights))
        update()
        d, most = float(ema._sources.decay), 1 if count is None else (1 + count) / (10 + count)
        assert min(d, most) == pytest.approx(min(decay, most))
        assert_moves(rng, weights, ema, update, 1 - min(d, most))


def test_variables_are_read_at_each_update(way: Way, rng: Rng) -> None:
    weights = variables(rng, "f64", [(4,)])
    decay, count = tf.Variable(0.5, dtype=tf.float64), tf.Variable(0)
    ema = ExponentialMovingAverage(decay, count)
    update = way(lambda: ema.apply(weights))
    update()
    for d, n in ((0.5, 1000), (0.875, 1000), (0.875, 2), (0.25, 2), (1.0, 10**6), (0.0, 7)):
        decay.assign(d)
        count.assign(n)
        assert_moves(rng, weights, ema, update, 1 - min(d, (1 + n) / (10 + n)))


def test_a_small_weight_is_not_rounded() -> None:
    """At 0.999999 the weight of the new value is off by more than a per cent there."""
    weight = tf.Variable(np.zeros(50))
    ours = ExponentialMovingAverage(0.999999)
    theirs = tf.train.ExponentialMovingAverage(0.999999)
    for value in (np.zeros(50), np.ones(50)):
        weight.assign(value)
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
    for step in range(101):
        for ema in (ours, nearest, theirs):
            ema.apply([weight])
        if step == 0:
            weight.assign(2 * weight)
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
    shape: tuple[int, ...], zero_debias: bool, way: Way, rng: Rng
) -> None:
    fed = [drawn(rng, shape) for _ in range(20)]
    ema = ExponentialMovingAverage(0.9375, zero_debias=zero_debias)
    source = tf.Variable(fed[0])
    update = way(lambda: ema.apply({"loss": source + 0.0}))
    for value, want in zip(fed, in_a_graph(0.9375, fed, zero_debias), strict=True):
        source.assign(value)
        update()
        np.testing.assert_allclose(ema.average("loss").numpy(), want, rtol=0, atol=1e-13)
    assert not ema.average("loss").trainable


def test_debiasing_while_the_decay_grows(way: Way, rng: Rng) -> None:
    """The average from zero, over the share of what was seen: 1 minus the product of the decays."""
    count, source = tf.Variable(0), tf.Variable(drawn(rng, (5,)))
    ema = ExponentialMovingAverage(0.99, count, zero_debias=True)
    update = way(lambda: ema.apply({"x": source * 1.0}))
    biased, left = np.zeros(5), 1.0
    for n in (0, 1, 4, 9, 100, 100_000):
        count.assign(n)
        move(rng, [source])
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


def test_variables_are_not_debiased(rng: Rng) -> None:
    """As with TensorFlow: their averages do not begin at zero."""
    weights = variables(rng)
    plain, debiased = ExponentialMovingAverage(0.9), ExponentialMovingAverage(0.9, zero_debias=True)
    for _ in range(3):
        plain.apply(weights)
        debiased.apply(weights)
        move(rng, weights)
    assert_equal(values(averages(plain, weights)), values(averages(debiased, weights)))


def test_tensors_and_variables_together(way: Way, rng: Rng) -> None:
    (weight,) = variables(rng, "f64", [(4,)])
    ema = ExponentialMovingAverage(0.5)
    update = way(lambda: ema.apply({"norm": tf.reduce_sum(weight**2), "w": weight}))
    update()
    first = weight.numpy().copy()
    assert_moves(rng, [weight], ema, update, 0.5)
    want = 0.25 * (first**2).sum() + 0.5 * (weight.numpy() ** 2).sum()
    np.testing.assert_allclose(ema.average("norm").numpy(), want, rtol=1e-14)
    assert list(ema.shadow) == ["w", "norm"]


def mixed(rng: Rng, count: int) -> list[Any]:
    """Variables of several dtypes, with rows and without."""
    shapes = [(5,), (2, 3), (), (3, 1, 2), (0, 4)]
    codes = ("f32", "f64", "f32")
    return [variables(rng, codes[i % 3], [shapes[i % 5]])[0] for i in range(count)]


def test_many_variables_are_averaged_and_what_was_read_before_stays(way: Way, rng: Rng) -> None:
    weights = mixed(rng, 150) + variables(rng)
    ema = ExponentialMovingAverage(0.75)
    update = way(lambda: ema.apply(weights))
    want, held = values(weights), []
    for step in range(6):
        if step:
            move(rng, weights)
        update()
        want = [old + 0.25 * (new - old) for old, new in zip(want, values(weights), strict=True)]
        got = averages(ema, weights)
        for one, exact in zip(values(got), want, strict=True):
            np.testing.assert_allclose(one, exact, rtol=0, atol=(step + 1) * SCALE * 2**-22)
        # Tensors of the same memory, and what was read.
        held += [([one.value() for one in got], values(got))]
        held += [([one.read_value() for one in got], values(got))]
    for tensors, known in held:
        assert_equal(values(tensors), known)


def test_the_third_apply_traces_nothing_that_grows_with_the_variables(
    rng: Rng, monkeypatch: pytest.MonkeyPatch
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


def test_order_within_a_function(rng: Rng) -> None:
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


def test_order_in_a_loop_and_a_branch(rng: Rng) -> None:
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


def test_averages_that_begin_in_a_loop(rng: Rng) -> None:
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


def test_several_functions_and_eager_calls(rng: Rng) -> None:
    weights, ema = averaged(rng, 0.5, "f64", [(9,), (2, 2)])
    calls = [
        (traced(lambda: ema.apply(weights)), weights),
        (traced(lambda: ema.apply(weights[:1])), weights[:1]),
        (lambda: ema.apply(weights), weights),
        (lambda: ema.apply(weights[1:]), weights[1:]),
        (ema.apply, weights),
    ]
    for number in rng.integers(0, len(calls), 40):
        call, those = calls[number]
        move(rng, weights)
        others = averages(ema, [one for one in weights if all(one is not it for it in those)])
        kept = values(others)
        assert_moves(rng, those, ema, call, 0.5)
        assert_equal(values(others), kept)


def test_two_averages_of_one_variable(rng: Rng) -> None:
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
        for ema, exact in zip((slow, fast), want, strict=True):
            np.testing.assert_allclose(ema.average(weights[0]).numpy(), exact, atol=1e-13)


def test_an_update_in_place_stays_there(way: Way, rng: Rng) -> None:
    """No copies: the memory of an average is the same from step to step."""
    weights = variables(rng, "f32", [(LARGE,)])
    ema = ExponentialMovingAverage(0.5)
    update = way(lambda: ema.apply(weights))
    update()
    addresses = set()
    for _ in range(6):
        update()
        addresses.add(np.from_dlpack(ema.average(weights[0]).value()).ctypes.data)
        move(rng, weights)
    assert len(addresses) == 1


def test_an_update_is_prepared_once(rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_outer_tape_changes_nothing(way: Way, rng: Rng) -> None:
    (weight,) = weights = variables(rng, "f64", [(4,)])
    ema = ExponentialMovingAverage(0.5)
    update = way(lambda: ema.apply(weights))
    x = tf.constant(drawn(rng, (4,)))
    update()
    for _ in range(3):
        with tf.GradientTape() as tape:
            assert_moves(rng, weights, ema, update, 0.5)
            loss = tf.reduce_sum(weight * x)
        np.testing.assert_array_equal(tape.gradient(loss, weight), x)
