"""Names, checkpoints, swaps and refusals of ``fastema.tensorflow``."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from fastema.errors import ArgumentError, BridgeError, DTypeError, LayoutError, StateError
from fastema.tensorflow import ExponentialMovingAverage

from .variables import CODES, SCALE, Rng, build_average, move, to_array, values, variables
from .ways import Way, assert_equal, averages, eagerly, traced

pytestmark = pytest.mark.tensorflow


def test_names_match_tensorflow() -> None:
    weights = [
        tf.Variable([1.0, 2.0], name="a/w"),
        tf.Variable(1.0, name="w"),
        tf.Variable([2.0]),
        tf.Variable(5.0, name="w"),
    ]
    ours = ExponentialMovingAverage(0.9, name="slow_one")
    theirs = tf.train.ExponentialMovingAverage(0.9, name="slow_one")
    assert ours.name == theirs.name
    assert ours.average(weights[0]) is theirs.average(weights[0]) is None
    for weight in weights[:3]:
        assert ours.average_name(weight) == theirs.average_name(weight)
    with tf.name_scope("elsewhere"):
        ours.apply(weights)
        theirs.apply(weights)
    for weight in weights:
        assert ours.average_name(weight) == theirs.average_name(weight)
        assert ours.average(weight).name == theirs.average(weight).name
    found = ours.variables_to_restore(weights)
    assert found == theirs.variables_to_restore(weights)
    assert ours.variables_to_restore() == found
    assert len(found) == 4
    assert ours.average_name("loss") == "loss/slow_one"


class SelfAveraging(tf.Module):
    """A model that averages its own weights and a loss."""

    def __init__(self, rng: Rng, code: str = "f32") -> None:
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

    def train(self, first: int, last: int) -> SelfAveraging:
        for step in range(first, last):
            self.step(tf.constant(step, tf.int64))
        return self

    def state(self) -> dict[str, np.ndarray]:
        return {name: to_array(average) for name, average in self.ema.shadow.items()}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("code", ["f32", "bf16"])
def test_resumed_run_is_bit_identical(code: str, before: bool, rng: Rng, tmp_path: Path) -> None:
    """With random rounding and debiasing, restored before or after the averages exist."""
    whole = SelfAveraging(rng, code).train(0, 4)
    path = tf.train.Checkpoint(model=whole).save(tmp_path / "half")
    whole.train(4, 9)
    resumed = SelfAveraging(rng, code)
    if not before:
        resumed.train(50, 52)
    status = tf.train.Checkpoint(model=resumed).restore(path)
    if before:
        with pytest.raises(AssertionError, match="shadow"):
            status.assert_consumed()
    resumed.train(4, 5)
    status.assert_consumed()
    resumed.train(5, 9)
    assert list(resumed.state()) == list(whole.state())
    assert_equal(resumed.state().values(), whole.state().values())


@pytest.mark.parametrize("code", CODES)
def test_swapped_shows_averages_and_restores_every_bit(code: str, rng: Rng) -> None:
    weights, ema = build_average(rng, 0.9, code)
    for _ in range(2):
        ema.apply(weights)
        move(rng, weights)
    raw, mean = [to_array(w) for w in weights], [to_array(a) for a in averages(ema, weights)]
    held = [weight.read_value() for weight in weights]
    for _ in range(2):
        with ema.swapped():
            assert_equal([to_array(w) for w in weights], mean)
            assert_equal([to_array(a) for a in averages(ema, weights)], raw)
        assert_equal([to_array(w) for w in weights], raw)
        assert_equal([to_array(a) for a in averages(ema, weights)], mean)
    assert_equal([tensor.numpy().tobytes() for tensor in held], [a.tobytes() for a in raw])
    ema.apply(weights)


def test_refused_call_inside_swapped_restores_the_weights(rng: Rng, tmp_path: Path) -> None:
    weights, ema = build_average(rng)
    checkpoint = tf.train.Checkpoint(ema=ema)
    path = checkpoint.save(tmp_path / "c")
    update = traced(lambda: ema.apply(weights))
    update()
    move(rng, weights)
    raw, mean = values(weights), values(averages(ema, weights))
    inside: list[Callable[[], object]] = [
        lambda: ema.apply(weights),
        lambda: ema.apply([tf.Variable(1.0)]),
        update,
        lambda: checkpoint.save(tmp_path / "d"),
        lambda: checkpoint.restore(path),
        lambda: ema.swapped().__enter__(),
    ]
    for refused in inside:
        kinds = (StateError, tf.errors.UnknownError)
        with pytest.raises(kinds, match=r"swapped\(\)"), ema.swapped():
            refused()
        assert_equal(values(weights), raw)
        assert_equal(values(averages(ema, weights)), mean)
    assert len(ema.shadow) == len(weights)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Install the default SIGINT handler: a background process ignores interrupts."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_swap_restores_the_weights(rng: Rng) -> None:
    weights, ema = build_average(rng)
    raw = values(weights)
    for when in (0, 1):
        with ema.swapped():
            pass
        plan = ema._plan(ema._get_group(weights))
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


def refusals() -> Iterator[tuple[str, type[Exception], str, Callable[[], Any]]]:
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
    yield "no name", ArgumentError, "not a name", lambda: {3: tf.Variable(1.0)}
    yield "empty name", ArgumentError, "not a name", lambda: {"": tf.constant(1.0)}
    yield "taken", ArgumentError, "another average", lambda: {"w": tf.Variable(1.0)}
    yield "taken too", ArgumentError, "variable's average", lambda: {"w": tf.constant(1.0)}
    yield "shape", LayoutError, r"\(2,\)", lambda: {"loss": tf.constant([1.0, 2.0])}
    yield "dtype", LayoutError, "float64", lambda: {"loss": tf.constant(1.0, tf.float64)}


@pytest.mark.parametrize(
    ("error", "words", "given"), [pytest.param(*rest, id=name) for name, *rest in refusals()]
)
def test_invalid_variables_are_refused_before_any_change(
    error: type[Exception], words: str, given: Any, way: Way
) -> None:
    """Valid variables that come before the invalid one are not touched either."""
    weight = tf.Variable([1.0, 2.0], name="w")
    ema = ExponentialMovingAverage(0.5)
    ema.apply({"w": weight, "loss": tf.constant(4.0)})
    weight.assign([5.0, 6.0])
    wrong = given()
    if isinstance(wrong, list):
        wrong = [weight, tf.Variable(3.0, name="fresh"), *wrong]
    elif isinstance(wrong, dict):
        wrong = {"w": weight, "fresh": tf.Variable(3.0)} | wrong
    # TensorFlow raises its own class for errors in tracing.
    kinds = error if way is eagerly else Exception
    with pytest.raises(kinds, match=words):
        way(lambda: ema.apply(wrong))()
    assert list(ema.shadow) == ["w", "loss"]
    assert ema.average(weight).numpy().tolist() == [1.0, 2.0]
    assert ema.average("loss").numpy() == 2.0


def test_decays_and_counts_out_of_range_are_refused_at_once() -> None:
    for numbers, words in (
        ((1.5,), r"decay=1.5: expected a finite number in \[0, 1\]"),
        (("0.9x",), r"decay='0.9x': expected a finite number in \[0, 1\]"),
        ((0.9, -1), "num_updates=-1: expected a finite number of at least 0"),
        ((tf.constant([0.5]),), r"decay of shape \(1,\) .*expected a real scalar"),
    ):
        with pytest.raises(ArgumentError, match=words):
            ExponentialMovingAverage(*numbers)


def test_tensor_whose_shape_is_unknown_while_tracing_is_refused_by_name() -> None:
    ema = ExponentialMovingAverage(0.5)

    @tf.function(input_signature=[tf.TensorSpec([None])])
    def function(x: Any) -> None:
        ema.apply({"loss": x})

    with pytest.raises(Exception, match="'loss' is not known while tracing"):
        function(tf.ones(3))
    assert not ema.shadow


def test_copy_of_variables_and_their_average_is_independent(rng: Rng) -> None:
    weights, ema = build_average(rng)
    ema.apply(weights)
    held = values(averages(ema, weights))
    others, other = copy.deepcopy((weights, ema))
    assert_equal(values(averages(other, others)), held)
    assert [other.average_name(one) for one in others] == [ema.average_name(w) for w in weights]
    move(rng, others)
    other.apply(others)
    assert_equal(values(averages(ema, weights)), held)
    want = [old + 0.1 * (x - old) for old, x in zip(held, values(others), strict=True)]
    for got, expected in zip(values(averages(other, others)), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
