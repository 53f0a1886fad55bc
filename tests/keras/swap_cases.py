"""Tests of fastema.compat.keras on the backend that KERAS_BACKEND names; see test_backends.py."""

from functools import cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from fastema.compat.keras import SwapEMAWeights

from .data import BACKEND, MARKS, XV, YV, X, Y, fit
from .models import Weights, assert_same, differ, reset_model, state_of, trained_weights, values
from .runs import ErrorAt, HookRecorder

pytestmark = MARKS

State = tuple[Weights, Weights]
"""A model's trainable weights, and their averages in its optimizer."""


_models: dict[str, tuple[Any, Any, list[np.ndarray]]] = {}


def borrow_model(policy: str = "float32") -> Any:
    """Return a model with a built optimizer, in its initial state; reuse an unchanged one."""
    model, optimizer, first = _models.get(policy, (None, None, []))
    if model is None or model.optimizer is not optimizer or names_left_in(model):
        keras.utils.set_random_seed(11)
        layers = [
            keras.layers.Dense(6, "relu", name="first", dtype=policy),
            keras.layers.BatchNormalization(name="norm", momentum=0.5, dtype=policy),
            keras.layers.Dense(1, name="last", dtype=policy),
        ]
        model = keras.Sequential([keras.Input((4,)), *layers], name="net")
        model.compile(keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.8), "mse")
        model.optimizer.build(model.trainable_variables)
        first = values(state_of(model))
        _models[policy] = model, model.optimizer, first
    return reset_model(model, first)


def state(model: Any) -> State:
    raw = trained_weights(model)
    averages = model.optimizer._model_variables_moving_average
    return raw, dict(zip(raw, values(averages), strict=True))


def assert_state(found: Any, weights: Weights, averages: Weights) -> None:
    """Assert that a model, or a recorded state, has exactly these weights and averages."""
    found = found if isinstance(found, tuple) else state(found)
    assert_same(found[0], weights)
    assert_same(found[1], averages)


def train_by_hand() -> tuple[Any, State]:
    """Train a model for three batches; return it and its state."""
    model = borrow_model()
    for _ in range(3):
        model.train_on_batch(X[:8], Y[:8])
    before = state(model)
    assert differ(*before)
    return model, before


@cache
def reference_states(epochs: int = 2, policy: str = "float32") -> list[State]:
    """Return the states after each epoch of the same run without a swap."""
    seen = HookRecorder(state)
    fit(borrow_model(policy), seen, epochs=epochs, validation_data=None)
    return seen.at["epoch_end"]


def names_left_in(model: Any) -> set[str]:
    """Return the attributes that the callback left in the user's objects."""
    return {
        name
        for of in (model, model.optimizer)
        for name, value in vars(of).items()
        if type(value).__module__.startswith("fastema")
    }


CALLS: dict[str, Any] = {
    "evaluate": lambda model, *some: model.evaluate(XV, YV, verbose=0, callbacks=[*some]),
    "predict": lambda model, *some: model.predict(XV, verbose=0, callbacks=[*some]),
}


@pytest.mark.parametrize("policy", ["float32", "float16"])
def test_validation_uses_the_average_and_restores_every_bit(policy: str) -> None:
    want = reference_states(3, policy=policy)
    model, seen = borrow_model(policy), HookRecorder(state)
    fit(model, SwapEMAWeights(), seen, epochs=3)
    for at_test, at_end, (weights, averages) in zip(
        seen.at["test_begin"], seen.at["epoch_end"], want, strict=True
    ):
        assert_state(at_end, weights, averages)  # training is unaffected
        assert_state(at_test, averages, weights)  # the optimizer holds the weights
    assert differ(*want[0])


def test_failed_evaluation_restores_the_weights() -> None:
    ((weights, averages),) = reference_states(1)
    model, swap = borrow_model(), SwapEMAWeights()
    with pytest.raises(RuntimeError, match="planted"):
        fit(model, swap, ErrorAt(RuntimeError, "on_test_batch_end"))
    # On JAX, Keras ends even a failed fit with the average.
    assert_state(model, averages if BACKEND == "jax" else weights, averages)

    model, before = train_by_hand()
    statistics = values(model.non_trainable_variables)

    class Bad(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return (X[:4, :3] if index else X[:4]), Y[:4]  # wrong width

    # Each backend raises its own error.
    with pytest.raises(Exception):  # noqa: B017, PT011
        model.evaluate(Bad(), verbose=0, callbacks=[swap])
    assert_state(model, *before)
    for one, known in zip(values(model.non_trainable_variables), statistics, strict=True):
        assert one.tobytes() == known.tobytes()
    CALLS["evaluate"](model, swap)
    assert_same(trained_weights(model), before[0])


def test_saved_model_resumes_training(tmp_path: Path) -> None:
    want, model = reference_states(3), borrow_model()

    def save(epoch: int, logs: Any) -> None:
        if epoch == 0:
            model.save(tmp_path / "model.keras")

    saves = keras.callbacks.LambdaCallback(on_epoch_end=save)
    fit(model, saves, SwapEMAWeights(swap_on_epoch=True))
    model, seen = keras.models.load_model(tmp_path / "model.keras"), HookRecorder(state)
    fit(model, SwapEMAWeights(), seen, epochs=3, initial_epoch=1)
    for at_test, known in zip(seen.at["test_begin"], want[1:], strict=True):
        for got, exact in zip(at_test, known[::-1], strict=True):
            assert got.keys() == exact.keys()
            for name, one in got.items():
                np.testing.assert_allclose(one, exact[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ("on_epoch_end", RuntimeError),
        ("on_epoch_end", KeyboardInterrupt),
        ("on_train_batch_end", KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("after", ["predict", "fit", "swapping fit"])
@pytest.mark.parametrize("which", ["same", "fresh", "none"])
def test_interrupted_fit_keeps_the_weights(error: Any, after: str, which: str, hook: str) -> None:
    model, swap = borrow_model(), SwapEMAWeights(swap_on_epoch=True)
    with pytest.raises(error, match="planted"):
        fit(model, swap, ErrorAt(error, hook), epochs=3)
    want = reference_states(1)[0] if hook == "on_epoch_end" else state(model)
    on_epoch = after == "swapping fit"
    some = {"same": [swap], "fresh": [SwapEMAWeights(on_epoch)], "none": []}[which]
    if after in CALLS:
        CALLS[after](model, *some)
        if BACKEND != "jax":  # on JAX a failed fit ends with the average
            # Without the callback, the model is predicted as fit has left it.
            stays = which == "none" and hook == "on_epoch_end"
            assert_state(model, *(want[::-1] if stays else want))
    elif BACKEND == "jax":
        if which != "none":  # Keras alone cannot continue there
            fit(model, *some, epochs=1)
            assert_same(*state(model))
    else:
        start: list[Weights] = []
        note = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: start or start.append(trained_weights(model))
        )
        fit(model, *some, note, epochs=1)
        assert_same(start[0], want[0])
        assert_same(*state(model))
    assert (
        names_left_in(model) == set()
        or (which == "none" and after in CALLS)
        or ((BACKEND, which) == ("jax", "none"))
    )
