"""Tests of LossAverages with other callbacks and over several runs; see test_backends.py."""

import json
from typing import Any

import keras
import pytest

from fastema.errors import ArgumentError, CheckpointError, StateError
from fastema.keras import LossAverages

from ..support.smoothing import assert_close, ema
from .backends import on_one_backend
from .data import MARKS
from .losses import BATCHES, COMPILED, BatchErrors, X, Y, assert_exact, build, fit, float64_weights

pytestmark = MARKS


@on_one_backend
def test_lists_with_two_loss_averages_are_refused_and_other_orders_train() -> None:
    model = build()
    before = float64_weights(model)
    with pytest.raises(ArgumentError, match="two LossAverages"):
        fit(model, LossAverages(), LossAverages())
    assert all((one == two).all() for one, two in zip(before, float64_weights(model), strict=True))
    fit(model, LossAverages(), epochs=1)  # after a run that has failed

    inner = LossAverages()
    inner.set_model(model)
    hooks = ("on_train_begin", "on_train_batch_begin", "on_train_batch_end", "on_train_end")
    calls = {hook: getattr(inner, hook) for hook in hooks}
    fit(model, keras.callbacks.LambdaCallback(**calls), epochs=1)
    assert len(inner.history["loss_raw"]) == BATCHES
    lone = LossAverages()
    lone.set_model(model)
    lone.on_train_begin()
    model.train_on_batch(X, Y)
    with pytest.raises(StateError, match="on_train_batch_begin"):
        lone.on_train_batch_end(0, {})
    lone.on_train_end()
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.01)
    stop = keras.callbacks.EarlyStopping("loss_ema", mode="max")
    history = fit(model, rate, LossAverages(), stop, validation_data=(X, Y)).history
    assert stop.best == max(history["loss_ema"])


def test_averages_continue_in_the_next_fit_without_recompiling() -> None:
    calls: list[int] = []

    def loss(y: Any, y_pred: Any) -> Any:
        calls.append(1)
        return keras.ops.mean(keras.ops.square(y - y_pred), axis=-1)

    model = build(loss=loss)
    losses, errors = LossAverages(window_size=50, decay=0.95), BatchErrors()
    fit(model, losses, errors)
    traced = len(calls)
    assert not isinstance(vars(model)["train_function"], type(losses._sums))
    fit(model, losses, errors, initial_epoch=2, epochs=3)
    assert_exact(losses.history["loss_raw"], [(e**2).mean() for e in errors.batches])
    assert len(losses.history["loss_raw"]) == 3 * BATCHES
    assert_close(losses.history["loss_ema"], ema(losses.history["loss_raw"], 0.95))
    if COMPILED:
        assert len(calls) == traced
    assert fit(model, epochs=1).history.keys() == {"loss"}  # no trace of LossAverages
    losses.reset()
    assert not losses.averages
    assert not losses.history


def test_resumed_run_equals_an_uninterrupted_one() -> None:
    whole = LossAverages(window_size=7, decay=0.9)
    fit(build(), whole, epochs=4)
    model, first = build(), LossAverages(window_size=7, decay=0.9)
    fit(model, first, epochs=2)
    state = json.loads(json.dumps(first.state_dict()))
    second = LossAverages(window_size=7, decay=0.9)
    second.load_state_dict(state)
    assert second.averages == first.averages
    fit(model, second, initial_epoch=2, epochs=4)
    for name in ("loss_raw", "loss_sma", "loss_ema"):
        assert_exact(second.history[name], whole.history[name][2 * BATCHES :])
    with pytest.raises(CheckpointError, match="window_size"):
        LossAverages(window_size=8).load_state_dict(state)
