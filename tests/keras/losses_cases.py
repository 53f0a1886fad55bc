"""Tests of fastema.keras.LossAverages on the backend of KERAS_BACKEND; see test_keras.py."""

from __future__ import annotations

import copy
import csv
import gc
import json
import math
import pickle
import re
import threading
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from fastema.errors import ArgumentError, CheckpointError, NonFiniteError, StateError
from fastema.keras import EMAWeights, LossAverages

from ..support.smoothing import assert_close, ema, sma
from .backends import on_one_backend

BACKEND = keras.backend.backend()
COMPILED = BACKEND != "torch"
PURE = BACKEND == "jax"  # where nothing is written, and so nothing noted
BATCH, COUNT = 8, 45  # five batches of 8, and one of 5
BATCHES = 6
Curve = np.ndarray

pytestmark = [
    # What Keras does with TensorFlow and PyTorch.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning"),
]

_draw = np.random.default_rng(23)
X = _draw.normal(size=(COUNT, 4)).astype(np.float32)
Y = np.sin(X.sum(1, keepdims=True)).astype(np.float32)
W = _draw.uniform(0.2, 3.0, COUNT).astype(np.float32)
LABELS = (Y > 0.2).astype(np.float32)


def build(rate: float = 0.05, *, kind: type = keras.Sequential, **compiled: Any) -> Any:
    """A linear model: what its loss is can be said without Keras."""
    keras.utils.set_random_seed(7)
    model = kind([keras.Input((4,)), keras.layers.Dense(1, name="only")])
    model.compile(**{"optimizer": keras.optimizers.SGD(rate), "loss": "mse", **compiled})
    return model


def fit(model: Any, *callbacks: Any, y: Any = Y, **options: Any) -> Any:
    options = {"epochs": 2, "batch_size": BATCH, "verbose": 0, "shuffle": False, **options}
    return model.fit(X, y, callbacks=[*callbacks], **options)


def parts(values: np.ndarray) -> list[np.ndarray]:
    """By batch."""
    return [values[i : i + BATCH] for i in range(0, len(values), BATCH)]


def arrays(model: Any) -> list[np.ndarray]:
    return [np.asarray(keras.ops.convert_to_numpy(one), np.float64) for one in model.weights]


class Errors(keras.callbacks.Callback):
    """The model's errors on each batch, from its weights before the step, in float64."""

    def __init__(self, y: np.ndarray = Y) -> None:
        super().__init__()
        self.y = y
        self.batches: list[np.ndarray] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        kernel, bias = arrays(self.model)
        x, y = parts(X)[batch], parts(self.y)[batch]
        self.batches.append((x @ kernel + bias - y)[:, 0])

    def losses(self) -> Curve:
        return np.array([np.mean(one**2) for one in self.batches])


class Seen(keras.callbacks.Callback):
    """What the logs hold for callbacks that come after ours."""

    async_safe = True

    def __init__(self) -> None:
        super().__init__()
        self.batches: dict[int, dict[str, float]] = {}
        self.epochs: list[dict[str, float]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches[batch + 100_000 * len(self.epochs)] = dict(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append(dict(logs))

    def curve(self, name: str) -> Curve:
        return np.array([self.batches[key][name] for key in sorted(self.batches)])


def assert_exact(got: Any, want: Any, roundings: int = 12) -> None:
    """Within a few roundings of float32: those of the loss itself, in another order than ours."""
    want = np.asarray(want, np.float64)
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=roundings * 2.0**-24, atol=1e-7)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["none", "samples", "classes"])
def test_raw_is_the_batchs_own_loss(weights: str) -> None:
    y = LABELS if weights == "classes" else Y
    options: dict[str, Any] = {"validation_data": (X[:20], y[:20])}
    w = np.ones(COUNT)
    if weights == "samples":
        options["sample_weight"], w = W, W.astype(np.float64)
    if weights == "classes":
        options["class_weight"], w = {0: 0.5, 1: 3.0}, np.where(LABELS[:, 0] > 0, 3.0, 0.5)
    model = build(metrics=["mae"], weighted_metrics=[keras.metrics.MeanSquaredError(name="sq")])
    losses, errors = LossAverages(window_size=4, decay=0.8), Errors(y)
    fit(model, losses, errors, y=y, **options)

    history = losses.history
    both = list(zip(errors.batches, parts(w) * 2, strict=True))
    raw = [np.mean(v * e**2) for e, v in both]
    assert_exact(history["loss_raw"], raw)
    assert_exact(history["mae_raw"], [np.mean(np.abs(e)) for e in errors.batches])
    assert_exact(history["sq_raw"], [np.sum(v * e**2) / np.sum(v) for e, v in both])
    assert_close(history["loss_sma"], sma(history["loss_raw"], 4))
    assert_close(history["loss_ema"], ema(history["loss_raw"], 0.8))
    assert_close(history["mae_ema"], ema(history["mae_raw"], 0.8))
    # Another curve than Keras': the check must be able to fail.
    assert np.abs(np.diff(raw)).max() > 0.05


def test_curves_are_whole_where_nobody_looks_at_batches() -> None:
    """They are then worked out for many batches at a time: for more of them than one time takes."""
    x, y = np.repeat(X, 15, 0), np.repeat(Y, 15, 0)
    model, losses = build(rate=0.0), LossAverages(window_size=5, decay=0.95)
    kernel, bias = arrays(model)
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


def test_logs_of_batches_and_epochs() -> None:
    losses, seen = LossAverages(window_size=3, decay=0.7), Seen()
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


def test_keras_values_stay_the_same_to_the_bit() -> None:
    """Its own losses and metrics, of batches and epochs, and the weights."""
    compiled: dict[str, Any] = {"metrics": ["mae", keras.metrics.RootMeanSquaredError(name="r")]}
    found = []
    for ours in ([], [LossAverages()]):
        model, seen = build(**compiled), Seen()
        history = fit(model, *ours, seen, validation_data=(X[:9], Y[:9])).history
        curves = {name: seen.curve(name).tolist() for name in ("loss", "mae", "r")}
        for name in ("loss", "mae", "r", "val_loss", "val_mae"):
            curves["epoch " + name] = history[name]
        found.append((curves, [one.tolist() for one in arrays(model)]))
        compiled["metrics"] = ["mae", keras.metrics.RootMeanSquaredError(name="r")]
    assert found[0] == found[1]


def test_root_mean_squared_error_is_the_root_of_the_batchs_mean() -> None:
    losses, errors = LossAverages(), Errors()
    fit(build(metrics=[keras.metrics.RootMeanSquaredError(name="r")]), losses, errors)
    assert_exact(losses.history["r_raw"], np.sqrt(errors.losses()))


@pytest.mark.parametrize("own_step", [False, True])
def test_late_in_a_long_epoch(own_step: bool) -> None:
    """Sums as they are after millions of batches: their differences would be nothing but noise."""

    class Late(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            for metric in (self.model.metrics[0],):
                metric.total.assign(3e7)
                metric.count.assign(2e7)

    class Own(keras.Sequential):
        def compute_metrics(self, *arguments: Any, **options: Any) -> Any:
            return super().compute_metrics(*arguments, **options)

    losses, errors, seen = LossAverages(), Errors(), Seen()
    fit(build(kind=Own if own_step else keras.Sequential), Late(), losses, errors, seen)
    assert seen.curve("loss").min() > 1.49  # so it was late
    if own_step and PURE:
        assert np.abs(losses.history["loss_raw"] - errors.losses()).max() > 1e-3
        # What the documentation says: half a unit in the last place of the sum, by the count.
        sizes = np.array([len(one) for one in errors.batches])
        assert (
            np.abs(losses.history["loss_raw"] - errors.losses()) <= 3.1e7 * 2**-24 / sizes
        ).all()
    else:
        assert_exact(losses.history["loss_raw"], errors.losses())


def test_outputs_of_their_own_losses() -> None:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    heads = [keras.layers.Dense(1, name=name)(inputs) for name in ("a", "b")]
    model = keras.Model(inputs, heads)
    model.compile(
        keras.optimizers.SGD(0.02), ["mse", "mae"], loss_weights=[2.0, 0.5], metrics=[["mae"], None]
    )
    first: list[np.ndarray] = []
    second: list[np.ndarray] = []

    class Both(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            kernel_a, bias_a, kernel_b, bias_b = arrays(self.model)
            x, y = parts(X)[batch], parts(Y)[batch]
            first.append(x @ kernel_a + bias_a - y)
            second.append(x @ kernel_b + bias_b - 2 * y)

    losses = LossAverages()
    fit(model, losses, Both(), y=[Y, 2 * Y])
    a = np.array([np.mean(e**2) for e in first])
    b = np.array([np.mean(np.abs(e)) for e in second])
    assert_exact(losses.history["a_loss_raw"], a)
    assert_exact(losses.history["b_loss_raw"], b)
    assert_exact(losses.history["loss_raw"], 2 * a + 0.5 * b)
    assert_exact(losses.history["a_mae_raw"], [np.mean(np.abs(e)) for e in first])


@pytest.mark.parametrize("own_step", [False, True])
def test_an_execution_of_several_steps_is_their_mean(own_step: bool) -> None:
    class Own(keras.Sequential):
        def compute_metrics(self, *arguments: Any, **options: Any) -> Any:
            return super().compute_metrics(*arguments, **options)

    model = build(kind=Own if own_step else keras.Sequential, steps_per_execution=4, rate=0.0)
    losses, seen = LossAverages(window_size=3, decay=0.5), Seen()
    if BACKEND == "torch":
        with pytest.raises(ValueError, match="steps_per_execution"):
            fit(model, losses)
        return
    kernel, bias = arrays(model)
    squares = (X @ kernel + bias - Y)[:, 0] ** 2
    fit(model, losses, seen, epochs=3)
    assert_exact(losses.history["loss_raw"], [squares[:32].mean(), squares[32:].mean()] * 3, 40)
    assert_close(losses.history["loss_ema"], ema(losses.history["loss_raw"], 0.5))
    assert_close(seen.curve("loss_sma"), losses.history["loss_sma"])


def test_accumulated_gradients() -> None:
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    losses, errors = LossAverages(), Errors()
    fit(build(optimizer=optimizer), losses, errors)
    assert_exact(losses.history["loss_raw"], errors.losses())


def test_eager() -> None:
    losses, errors = LossAverages(), Errors()
    fit(build(run_eagerly=True, metrics=["mae"]), losses, errors)
    assert_exact(losses.history["loss_raw"], errors.losses())
    assert_exact(losses.history["mae_raw"], [np.mean(np.abs(e)) for e in errors.batches])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By XLA, or by PyTorch's compiler, whose slow part is left out here."""
    if BACKEND == "torch":
        import torch

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    losses, errors = LossAverages(), Errors()
    fit(build(jit_compile=True, metrics=["mae"]), losses, errors)
    assert_exact(losses.history["loss_raw"], errors.losses())
    assert_exact(losses.history["mae_raw"], [np.mean(np.abs(e)) for e in errors.batches])


def test_losses_added_by_layers_are_part_of_it() -> None:
    keras.utils.set_random_seed(7)
    layer = keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.5))
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    penalties: list[float] = []

    class Penalty(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            penalties.append(0.5 * float(np.sum(arrays(self.model)[0] ** 2)))

    losses, errors = LossAverages(), Errors()
    fit(model, losses, errors, Penalty())
    assert_exact(losses.history["loss_raw"], errors.losses() + penalties)


def test_a_batch_that_is_not_finite_spoils_itself_only() -> None:
    y = Y.copy()
    y[2 * BATCH] = 6.0

    def error(y: Any, y_pred: Any) -> Any:
        return keras.ops.where(y > 5.0, np.float32(np.nan), keras.ops.abs(y - y_pred))

    losses, seen = LossAverages(decay=0.5), Seen()
    fit(build(metrics=[error]), losses, seen, y=y, epochs=1)
    raw = np.array(losses.history["error_raw"])
    assert np.isnan(raw).tolist() == [False, False, True, False, False, False]
    assert np.isnan(seen.curve("error")).tolist() == [False, False, True, True, True, True]
    finite = np.delete(np.array(losses.history["error_ema"]), 2)
    assert_close(finite, ema(np.delete(raw, 2).tolist(), 0.5))
    with pytest.raises(NonFiniteError, match="error"):
        fit(build(metrics=[error]), LossAverages(on_nonfinite="raise"), y=y, epochs=1)


# -- what is averaged ------------------------------------------------------------------------------


def test_metrics_that_are_no_means_are_left_out() -> None:
    class Scaled(keras.metrics.Mean):
        def result(self) -> Any:
            return 3.0 * super().result()

        def update_state(self, y: Any, y_pred: Any, sample_weight: Any = None) -> None:
            super().update_state(keras.ops.abs(y - y_pred))

    def metrics() -> list[Any]:
        return [keras.metrics.AUC(name="auc"), Scaled(name="scaled"), "mae"]

    history = fit(build(metrics=metrics()), LossAverages(), y=LABELS).history
    ours = {f"{name}_{kind}" for name in ("loss", "mae") for kind in ("raw", "sma", "ema")}
    assert history.keys() == ours | {"auc", "loss", "mae", "scaled"}
    chosen = fit(build(metrics=metrics()), LossAverages(metrics=("mae",)), y=LABELS).history
    assert {name for name in chosen if "_" in name} == {"mae_raw", "mae_sma", "mae_ema"}
    with pytest.raises(ArgumentError, match=r"'auc': it is no mean .* 'loss', 'mae'"):
        fit(build(metrics=metrics()), LossAverages(metrics=["auc"]), y=LABELS)
    with pytest.raises(ArgumentError, match="'acc': the model logs nothing of this name"):
        fit(build(), LossAverages(metrics=["loss", "acc"]))


def test_a_model_without_means() -> None:
    class Nothing(keras.Sequential):
        @property
        def metrics(self) -> list[Any]:
            return []

    losses = LossAverages()
    fit(build(kind=Nothing), losses, epochs=1)
    assert not losses.history


@on_one_backend
def test_what_is_logged_can_be_chosen() -> None:
    history = fit(build(), LossAverages(window_size=None, raw=False), epochs=1).history
    assert history.keys() == {"loss", "loss_ema"}
    losses = LossAverages(decay=None, record=False)
    assert fit(build(), losses, epochs=1).history.keys() == {"loss", "loss_raw", "loss_sma"}
    assert not losses.history
    debiased = LossAverages(decay=0.9, debias=True)
    fit(build(), debiased)
    raw = debiased.history["loss_raw"]
    assert_close(debiased.history["loss_ema"], ema(raw, 0.9, debias=True))
    for wrong in ({"window_size": 0}, {"decay": 1.5}, {"metrics": "loss"}, {"on_nonfinite": "no"}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            LossAverages(**wrong)


class OwnStep(keras.Sequential):
    """A step as people write it: names of logs that are not those of metrics."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.total_tracker = keras.metrics.Mean(name="tracked_total")
        self.other_tracker = keras.metrics.Mean(name="size")

    @property
    def metrics(self) -> list[Any]:
        return [self.total_tracker, self.other_tracker]

    def _logs(self, loss: Any, y_pred: Any) -> dict[str, Any]:
        self.total_tracker.update_state(loss)
        self.other_tracker.update_state(keras.ops.abs(y_pred))
        result = self.total_tracker.result()
        return {"loss": result, "size": self.other_tracker.result(), "twice": 2 * result}

    if BACKEND == "tensorflow":

        def train_step(self, data: Any) -> Any:
            import tensorflow as tf

            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x, y, y_pred)
            gradients = tape.gradient(loss, self.trainable_weights)
            self.optimizer.apply(gradients, self.trainable_weights)
            return self._logs(loss, y_pred)

    elif BACKEND == "torch":

        def train_step(self, data: Any) -> Any:
            import torch

            x, y = data
            self.zero_grad()
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
            loss.backward()
            gradients = [one.value.grad for one in self.trainable_weights]
            with torch.no_grad():
                self.optimizer.apply(gradients, self.trainable_weights)
            return self._logs(loss, y_pred)

    else:

        def train_step(self, state: Any, data: Any) -> Any:
            import jax

            x, y = data
            weights, rest, optimizer, sums = state

            def losses(weights: Any) -> Any:
                y_pred, _ = self.stateless_call(weights, rest, x, training=True)
                return self.compute_loss(x, y, y_pred), y_pred

            (loss, y_pred), gradients = jax.value_and_grad(losses, has_aux=True)(weights)
            weights, optimizer = self.optimizer.stateless_apply(optimizer, gradients, weights)
            mapping = list(zip(self.metrics_variables, sums, strict=True))
            with keras.StatelessScope(state_mapping=mapping) as scope:
                logs = self._logs(loss, y_pred)
            sums = [scope.get_current_value(one) for one in self.metrics_variables]
            return logs, (weights, rest, optimizer, sums)


def test_a_train_step_of_the_users_own() -> None:
    model = build(kind=OwnStep)
    losses, errors, seen = LossAverages(), Errors(), Seen()
    history = fit(model, losses, errors, seen).history
    ours = {f"{name}_{kind}" for name in ("loss", "size") for kind in ("raw", "sma", "ema")}
    assert history.keys() == ours | {"loss", "size", "twice"}
    # Its tracker counts batches, not samples.
    assert_exact(losses.history["loss_raw"], errors.losses(), 100)
    assert_exact(seen.epochs[-1]["twice"], 2 * np.mean(errors.losses()[BATCHES:]))


def test_a_metric_that_writes_its_sums_in_its_own_way() -> None:
    class Mine(keras.metrics.Mean):
        def update_state(self, y: Any, y_pred: Any, sample_weight: Any = None) -> None:
            self.total.assign(self.total + keras.ops.sum(keras.ops.square(y - y_pred)))
            self.count.assign(self.count + keras.ops.cast(keras.ops.shape(y)[0], "float32"))

    losses, errors = LossAverages(), Errors()
    fit(build(metrics=[Mine(name="mine")]), losses, errors)
    assert_exact(losses.history["mine_raw"], errors.losses())
    assert_exact(losses.history["loss_raw"], errors.losses())


def test_a_train_function_that_goes_around_train_step_is_an_error() -> None:
    class Around(keras.Sequential):
        def make_train_function(self, force: bool = False) -> None:
            logs = {"loss": keras.ops.ones(())}

            def function(state: Any, iterator: Any = None) -> Any:
                next(iter(state if iterator is None else iterator))
                return logs if iterator is None else (logs, state)

            self.train_function = function

    model = build(kind=Around)
    if BACKEND == "torch":  # nothing is compiled: a function is as good as a step
        fit(model, LossAverages(), epochs=1)
        return
    with pytest.raises(StateError, match="does not go through its train_step"):
        fit(model, LossAverages(), epochs=1)


# -- other callbacks -------------------------------------------------------------------------------


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

    class Inner(keras.callbacks.Callback):
        """Calls others by itself: they are in no list."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = LossAverages()

        def on_train_begin(self, logs: Any = None) -> None:
            self.inner.set_model(self.model)
            self.inner.on_train_begin(logs)

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.inner.on_train_batch_begin(batch, logs)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.inner.on_train_batch_end(batch, logs)

        def on_train_end(self, logs: Any = None) -> None:
            self.inner.on_train_end(logs)

    inner = Inner()
    fit(model, inner, epochs=1)
    lone = LossAverages()
    lone.set_model(model)
    lone.on_train_begin()
    model.train_on_batch(X, Y)
    with pytest.raises(StateError, match="on_train_batch_begin"):
        lone.on_train_batch_end(0, {})
    lone.on_train_end()
    assert len(inner.inner.history["loss_raw"]) == BATCHES
    # These need nothing of ours.
    fit(
        model,
        keras.callbacks.EarlyStopping("val_loss"),
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.01),
        LossAverages(),
        validation_data=(X, Y),
    )


@on_one_backend
def test_files_stopping_and_rates_use_what_is_added(tmp_path: Path) -> None:
    losses = LossAverages(window_size=3)
    stop = keras.callbacks.EarlyStopping("loss_sma", mode="max", patience=1)
    path = tmp_path / "best.weights.h5"
    model = build()
    history = fit(
        model,
        losses,
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.ReduceLROnPlateau("loss_ema", mode="max", patience=0, factor=0.5),
        keras.callbacks.ModelCheckpoint(
            path, monitor="loss_ema", mode="min", save_best_only=True, save_weights_only=True
        ),
        stop,
        epochs=9,
    ).history
    assert len(history["loss"]) == stop.stopped_epoch + 1 == 2  # it falls, and was to rise
    assert float(model.optimizer.learning_rate) < 0.05
    assert path.exists()
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("loss", "loss_raw", "loss_sma", "loss_ema"):
        assert [float(row[name]) for row in rows] == history[name]


@on_one_backend
def test_progress_bar_shows_values_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    losses = LossAverages(window_size=2)
    fit(build(), losses, epochs=1, verbose=1)
    shown = re.findall(r"loss_(raw|sma|ema): ([-+.e\d]+)", capsys.readouterr().out.split("\n")[0])
    last = {name: float(number) for name, number in shown}
    assert last.keys() == {"raw", "sma", "ema"}
    for name, number in last.items():
        assert number == pytest.approx(losses.history[f"loss_{name}"][-1], abs=6e-5)
    assert len({round(one, 3) for one in last.values()}) == 3


@on_one_backend
@pytest.mark.skipif(find_spec("tensorflow") is None, reason="its callback writes with TensorFlow")
def test_tensorboard_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    losses = LossAverages(window_size=3)
    board = keras.callbacks.TensorBoard(tmp_path, update_freq="batch", write_graph=False)
    fit(build(), losses, board, validation_data=(X[:9], Y[:9]))
    del board
    gc.collect()
    events = EventAccumulator(str(tmp_path / "train"), size_guidance={"tensors": 0})  # all of them
    events.Reload()

    def curve(tag: str) -> list[float]:
        return [float(tensor_util.make_ndarray(one.tensor_proto)) for one in events.Tensors(tag)]

    for name in ("loss_raw", "loss_sma", "loss_ema"):
        want = np.float32(losses.history[name])
        assert curve(f"batch_{name}") == want.tolist()
        assert curve(f"epoch_{name}") == want[[BATCHES - 1, 2 * BATCHES - 1]].tolist()
    steps = [one.step for one in events.Tensors("batch_loss_raw")]
    assert steps == list(range(1, 2 * BATCHES + 1))


@on_one_backend
def test_beside_an_average_of_the_weights() -> None:
    alone = EMAWeights(0.8)
    fit(build(), alone)
    for place in (0, 1):
        ours, losses, errors = EMAWeights(0.8), LossAverages(), Errors()
        callbacks: list[Any] = [losses, errors]
        callbacks.insert(place, ours)
        fit(build(), *callbacks)
        assert_exact(losses.history["loss_raw"], errors.losses())
        for name, value in alone.ema.shadow.items():
            assert_exact(
                keras.ops.convert_to_numpy(ours.ema.shadow[name]), keras.ops.convert_to_numpy(value)
            )


@pytest.mark.parametrize("threads", [False, True])
def test_values_keep_their_batches_in_other_threads(threads: bool) -> None:
    """Where Keras runs callbacks so: on JAX and PyTorch."""

    class Chosen(LossAverages):
        async_safe = threads
        seen: set[int] = set()  # noqa: RUF012

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            super().on_train_batch_end(batch, logs)
            self.seen.add(threading.get_ident())

    x, y = np.repeat(X, 20, 0), np.repeat(Y, 20, 0)
    model = build(rate=0.0)
    kernel, bias = arrays(model)
    squares = (x @ kernel + bias - y)[:, 0] ** 2
    losses, seen = Chosen(window_size=5), Seen()
    model.fit(x, y, batch_size=3, epochs=2, shuffle=False, verbose=0, callbacks=[losses, seen])
    others = losses.seen - {threading.get_ident()}
    assert bool(others) == (threads and BACKEND != "tensorflow")
    assert_exact(losses.history["loss_raw"], squares.reshape(-1, 3).mean(1).tolist() * 2)
    assert len(seen.batches) == 2 * len(squares) // 3
    for name in ("loss_raw", "loss_sma", "loss_ema"):
        assert_close(seen.curve(name), losses.history[name])


# -- runs ------------------------------------------------------------------------------------------


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


def test_a_model_compiled_again_is_followed() -> None:
    model, losses = build(), LossAverages()
    fit(model, losses)
    model.compile(keras.optimizers.SGD(0.01), "mae", metrics=["mse"])
    errors = Errors()
    fit(model, losses, errors)
    assert_exact(losses.history["mse_raw"], errors.losses())
    absolute = [np.mean(np.abs(e)) for e in errors.batches]
    assert_exact(losses.history["loss_raw"][2 * BATCHES :], absolute)


@on_one_backend
def test_a_callback_goes_on_with_another_model() -> None:
    losses, errors = LossAverages(), Errors()
    for rate in (0.05, 0.01):
        fit(build(rate), losses, errors)
    assert_exact(losses.history["loss_raw"], errors.losses())


def test_a_run_that_fails_leaves_the_models_own_function() -> None:
    model, losses = build(), LossAverages()
    fit(model, losses, epochs=1)
    own = model.train_function

    def batches() -> Any:
        yield X[:BATCH], Y[:BATCH]
        yield X[:BATCH, :3], Y[:BATCH]  # does not fit the model

    with pytest.raises(Exception, match=r".+"):
        model.fit(batches(), steps_per_epoch=2, verbose=0, callbacks=[losses])
    assert model.train_function is own


def test_a_run_that_another_callback_ended_is_no_burden() -> None:
    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                raise OSError("no space left")

    model, losses = build(), LossAverages()
    with pytest.raises(OSError, match="no space"):
        fit(model, losses, Fails())
    seen = losses.history["loss_raw"].tolist()
    assert len(seen) == 2
    assert fit(model, y=100 * Y).history.keys() == {"loss"}
    model.train_on_batch(X, 100 * Y)
    assert losses.history["loss_raw"].tolist() == seen
    own = model.train_function
    assert "fastema" not in type(own).__module__
    again, errors = LossAverages(), Errors()
    fit(model, again, errors)
    assert_exact(again.history["loss_raw"], errors.losses())
    assert model.train_function is own
    with pytest.raises(ArgumentError, match="'acc'"):
        fit(model, LossAverages(metrics=["acc"]))
    assert model.train_function is own


def test_what_is_trained_in_a_callback_is_not_of_the_run() -> None:
    class Trains(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.train_on_batch(X, 100 * Y)

    class Nested(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                other.train_on_batch(X, Y)

    model, other, losses, errors = build(), build(), LossAverages(), Errors()
    fit(model, losses, errors, Trains(), Nested())
    assert_exact(losses.history["loss_raw"], errors.losses())
    assert "fastema" not in type(model.train_function).__module__


@on_one_backend
def test_copies_hold_the_averages_and_nothing_of_the_run() -> None:
    model, losses = build(), LossAverages()
    copy.deepcopy(losses)
    fit(model, losses)
    for other in (copy.deepcopy(losses), pickle.loads(pickle.dumps(losses))):
        assert other.history == losses.history
        fit(build(), other, epochs=1)
        assert len(other.history["loss_raw"]) == 3 * BATCHES
    assert len(losses.history["loss_raw"]) == 2 * BATCHES


@on_one_backend
def test_which_way_is_better_is_said_or_asked_for() -> None:
    stop = keras.callbacks.EarlyStopping(monitor="loss_ema", patience=1)
    model = build()
    history = fit(model, LossAverages(), stop, epochs=3).history
    assert len(history["loss"]) == 3  # it falls all the time, which is what is wanted
    stop = keras.callbacks.EarlyStopping(monitor="mae_sma")
    model = build(metrics=["mae"])
    with pytest.raises(ArgumentError, match=r"EarlyStopping\(monitor='mae_sma'\): say mode="):
        fit(model, LossAverages(), stop)
    assert fit(model).history.keys() == {"loss", "mae"}


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


def test_a_loop_of_ones_own() -> None:
    model, losses, errors = build(metrics=["mae"]), LossAverages(), Errors()
    callbacks = keras.callbacks.CallbackList([losses, errors], model=model)
    callbacks.on_train_begin()
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        for i, (x, y) in enumerate(zip(parts(X), parts(Y), strict=True)):
            callbacks.on_train_batch_begin(i)
            logs = model.train_on_batch(x, y, return_dict=True)
            callbacks.on_train_batch_end(i, logs)
        callbacks.on_epoch_end(epoch)
    callbacks.on_train_end()
    assert_exact(losses.history["loss_raw"], errors.losses())
    assert_exact(losses.history["mae_raw"], [np.mean(np.abs(e)) for e in errors.batches])
    assert not math.isnan(losses.averages["loss_ema"])


def test_shapes_that_are_not_known_and_datasets_without_an_end() -> None:
    def batches() -> Any:
        while True:
            yield from zip(parts(X), parts(Y), parts(W), strict=True)

    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mae"])
    losses = LossAverages()
    model.fit(
        batches(), steps_per_epoch=BATCHES, epochs=2, verbose=0, callbacks=[losses], shuffle=False
    )
    kernel, bias = arrays(model)
    errors = (X @ kernel + bias - Y)[:, 0]
    want = [np.mean(w * e**2) for e, w in zip(parts(errors), parts(W), strict=True)]
    assert_exact(losses.history["loss_raw"], want * 2)
    assert_exact(losses.history["mae_raw"], [np.mean(np.abs(e)) for e in parts(errors)] * 2)
