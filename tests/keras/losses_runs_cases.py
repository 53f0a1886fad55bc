"""Tests of LossAverages beside other callbacks, and in run after run; see test_backends.py."""

import json
from pathlib import Path
from typing import Any

import keras
import pytest

from fastema.errors import ArgumentError, CheckpointError, StateError
from fastema.keras import EMAWeights, LossAverages

from ..support.smoothing import assert_close, ema
from .backends import on_one_backend
from .data import MARKS
from .losses import (
    BATCHES,
    COMPILED,
    Errors,
    X,
    Y,
    arrays,
    assert_exact,
    build,
    fit,
)

pytestmark = MARKS


@on_one_backend
def test_callbacks_that_read_the_logs_must_come_later(tmp_path: Path) -> None:
    table = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    early: list[tuple[Any, str]] = [
        (table, "CSVLogger reads the logs"),
        (keras.callbacks.History(), "History reads the logs"),
        (keras.callbacks.EarlyStopping("loss_ema"), "EarlyStopping monitors 'loss_ema'"),
        (keras.callbacks.ReduceLROnPlateau("loss_sma"), "ReduceLROnPlateau monitors 'loss_sma'"),
    ]
    model = build()
    before = arrays(model)
    for other, what in early:
        with pytest.raises(ArgumentError, match=f"{what}.*put LossAverages first in the list"):
            fit(model, EMAWeights(), other, LossAverages())
    table.csv_file.close()
    assert all((one == two).all() for one, two in zip(before, arrays(model), strict=True))
    with pytest.raises(ArgumentError, match="two LossAverages"):
        fit(model, LossAverages(), LossAverages())

    # One that is called by another is in no list.
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
    # These need nothing of ours.
    fit(
        model,
        keras.callbacks.EarlyStopping("val_loss"),
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.01),
        LossAverages(),
        validation_data=(X, Y),
    )


def test_averages_go_on_in_the_next_fit_and_nothing_is_compiled_again() -> None:
    calls: list[int] = []

    def loss(y: Any, y_pred: Any) -> Any:
        calls.append(1)
        return keras.ops.mean(keras.ops.square(y - y_pred), axis=-1)

    model = build(loss=loss)
    losses, errors = LossAverages(window_size=50, decay=0.95), Errors()
    fit(model, losses, errors)
    traced = len(calls)
    assert not isinstance(vars(model)["train_function"], type(losses._sums))
    fit(model, losses, errors, initial_epoch=2, epochs=3)
    assert_exact(losses.history["loss_raw"], errors.losses())
    assert len(losses.history["loss_raw"]) == 3 * BATCHES
    assert_close(losses.history["loss_ema"], ema(losses.history["loss_raw"], 0.95))
    if COMPILED:
        assert len(calls) == traced
    assert fit(model, epochs=1).history.keys() == {"loss"}  # without us, as ever
    losses.reset()
    assert not losses.averages
    assert not losses.history


def test_resumed_run_goes_on_as_if_never_interrupted() -> None:
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
