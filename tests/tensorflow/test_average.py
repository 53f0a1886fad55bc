"""Averages of ``fastema.tensorflow`` beside those of ``tf.train``, and their order."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from fastema.tensorflow import ExponentialMovingAverage

from ..support import reference
from ..support.arrays import assert_same
from ..support.tolerance import unit_roundoff
from .variables import CODES, LARGE, SCALE, Rng, draw, move, to_array, values, variables
from .ways import Way, assert_moves, averages

pytestmark = pytest.mark.tensorflow


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("code", CODES)
def test_averages_match_the_reference_exactly(code: str, rounding: str, way: Way, rng: Rng) -> None:
    weights = variables(rng, code)
    ema = ExponentialMovingAverage(0.97, rounding=rounding, seed=9)
    update = way(lambda: ema.apply(weights))
    names: dict[int, str] = {}
    for step in range(8):
        before = [to_array(one) for one in (averages(ema, weights) if step else weights)]
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
                *(x.reshape(-1) for x in (old, to_array(weight))), 1.0 - 0.97, code, code, words
            )
            assert_same(to_array(average), want.reshape(old.shape), code)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_averages_match_tensorflow(code: str, counted: bool, way: Way, rng: Rng) -> None:
    """Compare fifty steps, at a decay that float32 and bfloat16 hold exactly."""
    decay = 0.9375
    weights = variables(rng, code)
    count = tf.Variable(0, dtype=tf.int64) if counted else None
    ours = ExponentialMovingAverage(decay, count, rounding="nearest")
    theirs = tf.train.ExponentialMovingAverage(decay, count)
    update = way(lambda: ours.apply(weights))
    u = max(unit_roundoff(code), unit_roundoff("f32") if counted else 0.0)
    # Theirs rounds five times a step (the weight, a difference, products, sums), with numbers
    # up to twice the scale. Each error then shrinks by the decay at every step.
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


def test_decay_and_count_variables_are_read_at_each_update(way: Way, rng: Rng) -> None:
    weights = variables(rng, "f64", [(4,)])
    decay, count = tf.Variable(0.5, dtype=tf.float64), tf.Variable(0)
    ema = ExponentialMovingAverage(decay, count)
    update = way(lambda: ema.apply(weights))
    update()
    for d, n in ((0.5, 1000), (0.875, 1000), (0.875, 2), (0.25, 2), (1.0, 10**6), (0.0, 7)):
        decay.assign(d)
        count.assign(n)
        assert_moves(rng, weights, ema, update, 1 - min(d, (1 + n) / (10 + n)))


def test_bfloat16_average_moves_where_nearest_rounding_stalls() -> None:
    """Theirs stalls, and so does ours to nearest; stochastic rounding follows the weights."""
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


def test_updates_keep_their_order_within_a_function(rng: Rng) -> None:
    weight = tf.Variable(draw(rng, (LARGE,)))
    ema = ExponentialMovingAverage(0.75)
    ema.apply([weight])
    start = weight.numpy().copy()

    @tf.function
    def function(first: Any, second: Any) -> tuple[Any, ...]:
        average = ema.average(weight)
        before = average + 0.0  # computed here; a plain read may be delayed
        weight.assign(first)
        ema.apply([weight])
        between = average + 0.0
        weight.assign_add(second)
        ema.apply([weight])
        after = average + 0.0
        weight.assign(first)
        return before, between, after

    for _ in range(5):
        first, second = draw(rng, (LARGE,)), draw(rng, (LARGE,))
        before, between, after = function(first, second)
        np.testing.assert_array_equal(before, start)
        middle = 0.75 * start + 0.25 * first
        np.testing.assert_allclose(between, middle, rtol=0, atol=1e-14)
        start = 0.75 * middle + 0.25 * (first + second)
        np.testing.assert_allclose(after, start, rtol=0, atol=1e-14)
        start = after.numpy()
        np.testing.assert_array_equal(ema.average(weight).numpy(), start)
        np.testing.assert_array_equal(weight.numpy(), first)
