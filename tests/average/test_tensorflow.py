"""Averages of TensorFlow variables: written in place, without changing tensors of others."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import fastema
from fastema.errors import BridgeError

from ..support.requirements import require_packages
from .frameworks import DTYPES, TensorFlow, bit_patterns, values
from .truth import Loops

NEEDS = ("ml_dtypes",)


pytestmark = pytest.mark.tensorflow

DECAY = 0.9
bits, wide = TensorFlow().bits, TensorFlow().wide


def variables(seed: int) -> dict[str, Any]:
    return {name: tf.Variable(array) for name, array in values(seed).items()}


def assign(weights: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Assign a new tensor to every variable, like an optimizer step."""
    new = values(seed)
    TensorFlow().train(weights, new)
    return new


@pytest.mark.parametrize("dtype", DTYPES)
def test_swap_round_trip_is_exact_to_the_bit(dtype: str) -> None:
    variable = tf.Variable(bit_patterns(dtype, 0))
    ema = fastema.EMA([variable], DECAY)
    raw = bit_patterns(dtype, 1)
    for n in range(4):
        variable.assign(raw)
        held = variable.value()
        ema.apply_shadow()
        assert variable.numpy().tobytes() == bit_patterns(dtype, 0).tobytes()
        assert ema.shadow["0"].numpy().tobytes() == bit_patterns(dtype, 0).tobytes()
        assert ema.state_dict()["shadow.0.0"].tobytes() == bit_patterns(dtype, 0).tobytes()
        assert held.numpy().tobytes() == raw.tobytes()
        during = variable.value()
        ema.restore()
        assert variable.numpy().tobytes() == raw.tobytes(), n
        assert during.numpy().tobytes() == bit_patterns(dtype, 0).tobytes()


@given(
    st.lists(st.sampled_from(["assign", "share", "hold", "update", "swap", "tape"]), max_size=14)
)
def test_tensors_held_by_others_keep_their_values(steps: list[str]) -> None:
    held: list[tuple[Any, bytes]] = []
    weights = {name: tf.Variable(values(0)[name]) for name in "abe"}
    source = tf.constant(values(7)["a"])
    ema = fastema.EMA(weights, 0.5)
    loops = Loops(wide(weights), "f32", "f32")
    for n, step in enumerate(steps):
        if step == "assign":
            for name, one in weights.items():
                one.assign(values(n + 1)[name])
        elif step == "share":
            weights["a"].assign(source)
            held.append((source, source.numpy().tobytes()))
        elif step == "hold":
            held += [(one.value(), one.numpy().tobytes()) for one in weights.values()]
        elif step == "tape":
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(weights["b"] ** 3)
                ema.update()
            grad = tape.gradient(loss, weights["b"])
            np.testing.assert_allclose(grad, 3 * weights["b"].numpy() ** 2, rtol=1e-5)
        elif step == "swap":
            raw = bits(weights)
            with ema.swapped():
                held += [(one.value(), one.numpy().tobytes()) for one in weights.values()]
            assert bits(weights) == raw
        if step in ("update", "tape"):
            if step == "update":
                ema.update()
            loops.step(wide(weights), 0.5)
        assert all(tensor.numpy().tobytes() == was for tensor, was in held)
    loops.check(wide(ema.shadow))


def test_average_follows_eager_and_traced_optimizer_steps(python: Callable[..., str]) -> None:
    require_packages("keras")  # its backend holds for a whole process
    out = python(
        """
        import numpy as np, keras, tensorflow as tf, fastema

        for traced in (False, True):
            generator = np.random.default_rng(0)
            w, b = tf.Variable(generator.normal(size=(9, 3)).astype("f4")), tf.Variable(tf.ones(3))
            optimizer = keras.optimizers.Adam(0.05)
            optimizer.build([w, b])
            x = tf.constant(generator.normal(size=(20, 9)).astype("f4"))
            ema = fastema.EMA([w, b], 0.9)
            want = [one.numpy().astype(np.float64) for one in (w, b)]

            def step():
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((x @ w + b - 1.0) ** 2)
                optimizer.apply_gradients(zip(tape.gradient(loss, [w, b]), [w, b]))

            run = tf.function(step) if traced else step
            for n in range(12):
                before = w.numpy()
                run()
                assert not np.array_equal(before, w.numpy())
                ema.update()
                for i, one in enumerate((w, b)):
                    want[i] = want[i] + 0.1 * (one.numpy() - want[i])
                if n % 4 == 3:
                    raw = [one.numpy().tobytes() for one in (w, b)]
                    with ema.swapped():
                        np.testing.assert_allclose(w, want[0], rtol=1e-5, atol=1e-6)
                    assert [one.numpy().tobytes() for one in (w, b)] == raw
            for one, shadow in zip(want, ema.shadow.values()):
                np.testing.assert_allclose(shadow, one, rtol=1e-5, atol=1e-6)
            print(traced, ema.num_updates)
        """,
        KERAS_BACKEND="tensorflow",
        TF_CPP_MIN_LOG_LEVEL="3",
        CUDA_VISIBLE_DEVICES="",
        quiet=False,
    )
    assert out.split() == ["False", "12", "True", "12"]


def test_calls_inside_tf_function_are_refused() -> None:
    w = tf.Variable([1.0, 2.0])
    ema = fastema.EMA([w], 0.5)
    for call in (ema.update, ema.apply_shadow, lambda: ema.update([w]), lambda: ema.copy_to([w])):
        with pytest.raises(BridgeError, match=r"inside tf\.function"):
            tf.function(call, autograph=False)()
    assert (ema.num_updates, ema.applied) == (0, False)
    w.assign([3.0, 4.0])
    ema.update()
    np.testing.assert_array_equal(ema.shadow["0"], [2.0, 3.0])
    np.testing.assert_array_equal(w, [3.0, 4.0])


BAD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape": lambda w: {**w, "c": tf.Variable([1.0])},
    "string": lambda w: {**w, "c": tf.constant("text")},
    "number": lambda w: {**w, "c": 3.0},
    "integer": lambda w: {**w, "c": tf.Variable(1)},
    "complex": lambda w: {**w, "c": tf.Variable(1j)},
    "missing": lambda w: {n: one for n, one in w.items() if n != "c"},
    "more": lambda w: {**w, "f": tf.Variable(1.0)},
    "sparse": lambda w: {**w, "c": tf.sparse.from_dense([1.0])},
}


@pytest.mark.parametrize("case", BAD)
def test_refused_weights_change_nothing(case: str) -> None:
    weights, twin = variables(0), variables(0)
    ema, other = fastema.EMA(weights, 0.5), fastema.EMA(twin, 0.5)
    for n in range(1, 4):
        assign(weights, n)
        assign(twin, n)
        ema.update()
        other.update()
    bad = BAD[case](variables(9))
    raw = bits({name: one for name, one in bad.items() if isinstance(one, tf.Variable)})
    calls = [ema.update, ema.apply_shadow, ema.copy_to]
    for call in calls[:2] if case == "more" else calls:
        with pytest.raises(fastema.errors.FastemaError):
            call(bad)
    assert (ema.num_updates, ema.applied) == (3, False)
    assert bits({name: bad[name] for name in raw}) == raw
    assign(weights, 5)
    assign(twin, 5)
    ema.update()
    other.update()
    assert bits(ema.shadow) == bits(other.shadow)
