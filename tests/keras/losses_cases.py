"""Tests of the curves of LossAverages, on the backend of KERAS_BACKEND; see test_backends.py."""

from typing import Any

import keras
import numpy as np
import pytest

from fastema.errors import NonFiniteError
from fastema.keras import LossAverages

from ..support.smoothing import assert_close, ema, sma
from .data import MARKS
from .losses import (
    BATCH,
    BATCHES,
    BatchErrors,
    LogRecorder,
    W,
    X,
    Y,
    assert_exact,
    build,
    fit,
    float64_weights,
    split_batches,
)

pytestmark = MARKS


@pytest.mark.parametrize("weights", ["none", "samples", "classes"])
def test_raw_curve_is_the_loss_of_each_batch(weights: str) -> None:
    y = (Y > 0.2).astype(np.float32) if weights == "classes" else Y
    options: dict[str, Any] = {"validation_data": (X[:20], y[:20])}
    w = np.ones(len(X))
    if weights == "samples":
        options["sample_weight"], w = W, W.astype(np.float64)
    if weights == "classes":
        options["class_weight"], w = {0: 0.5, 1: 3.0}, np.where(y[:, 0] > 0, 3.0, 0.5)
    model = build(metrics=["mae"], weighted_metrics=[keras.metrics.MeanSquaredError(name="sq")])
    losses, errors = LossAverages(window_size=4, decay=0.8), BatchErrors(y)
    fit(model, losses, errors, y=y, **options)

    history = losses.history
    both = list(zip(errors.batches, split_batches(w) * 2, strict=True))
    raw = [np.mean(v * e**2) for e, v in both]
    assert_exact(history["loss_raw"], raw)
    assert_exact(history["mae_raw"], [np.mean(np.abs(e)) for e in errors.batches])
    assert_exact(history["sq_raw"], [np.sum(v * e**2) / np.sum(v) for e, v in both])
    assert_close(history["loss_sma"], sma(history["loss_raw"], 4))
    assert_close(history["loss_ema"], ema(history["loss_raw"], 0.8))
    assert_close(history["mae_ema"], ema(history["mae_raw"], 0.8))
    # The losses must vary, or Keras' running mean would pass too.
    assert np.abs(np.diff(raw)).max() > 0.05


def test_curves_are_complete_without_batch_callbacks() -> None:
    """Batches are then averaged in groups; this run has more batches than one group."""
    x, y = np.repeat(X, 15, 0), np.repeat(Y, 15, 0)
    model, losses = build(rate=0.0), LossAverages(window_size=5, decay=0.95)
    kernel, bias = float64_weights(model)
    squares = (x @ kernel + bias - y)[:, 0] ** 2
    options: dict[str, Any] = {"batch_size": 2, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, epochs=2, callbacks=[losses], **options).history
    want = [squares[i : i + 2].mean() for i in range(0, len(x), 2)]
    assert len(want) > 256
    assert_exact(losses.history["loss_raw"], want * 2)
    assert_close(losses.history["loss_ema"], ema(losses.history["loss_raw"], 0.95))
    for name in ("loss_raw", "loss_sma", "loss_ema"):
        curve = losses.history[name]
        assert history[name] == [curve[len(want) - 1], curve[-1]]


def test_batch_and_epoch_logs_hold_the_averages() -> None:
    losses, seen = LossAverages(window_size=3, decay=0.7), LogRecorder()
    history = fit(build(metrics=["mae"]), losses, seen, validation_data=(X[:9], Y[:9])).history
    names = {f"{name}_{kind}" for name in ("loss", "mae") for kind in ("raw", "sma", "ema")}
    assert losses.averages.keys() == names
    assert history.keys() == names | {"loss", "mae", "val_loss", "val_mae"}
    for name in names:
        assert_close(seen.curve(name), losses.history[name])
        ends = [losses.history[name][BATCHES * n - 1] for n in (1, 2)]
        assert history[name] == ends == [epoch[name] for epoch in seen.epochs]
        assert losses.averages[name] == losses.history[name][-1]
    assert history["loss"] != history["loss_raw"]


def test_keras_values_are_bit_identical_with_loss_averages() -> None:
    """Compare losses and metrics of batches and epochs, and the weights."""
    found = []
    for ours in ([], [LossAverages()]):
        metrics = ["mae", keras.metrics.RootMeanSquaredError(name="r")]
        model, seen = build(metrics=metrics), LogRecorder()
        history = fit(model, *ours, seen, validation_data=(X[:9], Y[:9])).history
        curves = {name: seen.curve(name).tolist() for name in ("loss", "mae", "r")}
        for name in ("loss", "mae", "r", "val_loss", "val_mae"):
            curves["epoch " + name] = history[name]
        found.append((curves, [one.tolist() for one in float64_weights(model)]))
    assert found[0] == found[1]


def test_nonfinite_batch_does_not_spoil_later_averages() -> None:
    y = Y.copy()
    y[2 * BATCH] = 6.0

    def error(y: Any, y_pred: Any) -> Any:
        return keras.ops.where(y > 5.0, np.float32(np.nan), keras.ops.abs(y - y_pred))

    losses, seen = LossAverages(decay=0.5), LogRecorder()
    fit(build(metrics=[error]), losses, seen, y=y, epochs=1)
    raw = np.array(losses.history["error_raw"])
    assert np.isnan(raw).tolist() == [False, False, True, False, False, False]
    assert np.isnan(seen.curve("error")).tolist() == [False, False, True, True, True, True]
    finite = np.delete(np.array(losses.history["error_ema"]), 2)
    assert_close(finite, ema(np.delete(raw, 2).tolist(), 0.5))
    with pytest.raises(NonFiniteError, match="error"):
        fit(build(metrics=[error]), LossAverages(on_nonfinite="raise"), y=y, epochs=1)
