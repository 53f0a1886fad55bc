"""Tests of fastema.keras on the backend that KERAS_BACKEND names; see test_keras.py."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import fastema
from fastema.errors import ArgumentError, CheckpointError, StateError
from fastema.keras import EMAWeights

from ..support.tolerance import unit_roundoff
from .backends import on_one_backend

BACKEND = keras.backend.backend()
DECAY = 0.8
BATCH, BATCHES = 4, 6
Weights = dict[str, np.ndarray]

pytestmark = [
    # What Keras does with TensorFlow, PyTorch and its own files.
    pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
]

_draw = np.random.default_rng(5)
X = _draw.normal(size=(BATCH * BATCHES, 4)).astype(np.float32)
Y = np.sin(X.sum(1, keepdims=True))
XV, YV = X[::3] + np.float32(0.1), Y[::3]


# -- models, made once: what they are compiled to is kept, their state is not ----------------------


def build(
    optimizer: Any = None,
    *,
    policy: str = "float32",
    known: bool = True,
    dropout: float = 0.25,
    **compiled: Any,
) -> Any:
    layers = [
        keras.layers.Dense(6, "relu", name="first", dtype=policy),
        keras.layers.BatchNormalization(name="norm", momentum=0.5, dtype=policy),
        keras.layers.Dropout(dropout, seed=3, name="drop", dtype=policy),
        keras.layers.Dense(1, name="last", dtype=policy),
    ]
    model = keras.Sequential([keras.Input((4,)), *layers] if known else layers, name="net")
    model.compile(optimizer or keras.optimizers.SGD(0.05, momentum=0.5), "mse", **compiled)
    return model


MAKERS: dict[str, Callable[[], Any]] = {
    "plain": build,
    "other": build,
    # Keras does not take up the random numbers of a Dropout where it left them.
    "resumable": lambda: build(dropout=0.0),
    "eager": lambda: build(run_eagerly=True),
    "accumulating": lambda: build(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)),
    "several": lambda: build(steps_per_execution=4),
    # The largest scale there is: it overflows until it has been halved a few times.
    "scaled": lambda: build(
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**127)
    ),
    "bfloat16": lambda: build(policy="bfloat16"),
}
_models: dict[str, tuple[Any, list[Any]]] = {}


def _state(model: Any) -> list[Any]:
    return [*model.variables, *model.optimizer.variables]


def model_of(kind: str = "plain") -> Any:
    """The model of a kind, in the state that it had when it was new."""
    if kind not in _models:
        keras.utils.set_random_seed(11)
        made = MAKERS[kind]()
        made.optimizer.build(made.trainable_variables)
        first = [np.array(keras.ops.convert_to_numpy(one)) for one in _state(made)]
        _models[kind] = made, first
    model, first = _models[kind]
    model._jax_state, model._jax_state_synced = None, True
    model._initial_epoch = 0  # which BackupAndRestore sets
    vars(model).pop("evaluate", None)
    for variable, value in zip(_state(model), first, strict=True):
        variable.assign(value)
    for metric in model.metrics:
        metric.reset_state()
    return model


def fit(model: Any, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    options = {"validation_data": (XV, YV), **options}
    return model.fit(
        X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=[*callbacks],
        **options,
    )  # fmt: skip


# -- weights, and what is to become of them --------------------------------------------------------


def synced(model: Any) -> None:
    if BACKEND == "jax":
        model.jax_state_sync()


def weights(model: Any) -> Weights:
    """Copies of a model's weights by name."""
    synced(model)
    return {
        one.path.removeprefix("net/"): np.array(keras.ops.convert_to_numpy(one))
        for one in model.weights
    }


def trained(model: Any) -> set[str]:
    return {one.path.removeprefix("net/") for one in model.trainable_weights}


def average(ema: EMAWeights, which: int = 0) -> Weights:
    return {
        name: np.array(keras.ops.convert_to_numpy(one))
        for name, one in ema.ema.shadows[which].items()
    }


def assert_same(got: Weights, want: Weights) -> None:
    """Equal to the bit."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert got[name].tobytes() == want[name].tobytes(), name


def differ(one: Weights, other: Weights) -> bool:
    """Whether every tensor differs."""
    return all(one[name].tobytes() != other[name].tobytes() for name in one)


def assert_near(got: Weights, want: Weights, roundings: int) -> None:
    for name, exact in want.items():
        bound = roundings * 4 * unit_roundoff("f32") * max(1.0, float(np.abs(exact).max()))
        np.testing.assert_allclose(got[name], exact, rtol=0, atol=bound, err_msg=name)


class Recorder(keras.callbacks.Callback):
    """The weights at every step of the optimizer: wherever they changed."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.start = weights(self.model)
        self.steps: list[Weights] = []
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = weights(self.model)
        names = trained(self.model)
        before = self.steps[-1] if self.steps else self.start
        self.batches += 1
        if any((now[name] != before[name]).any() for name in names):
            self.steps.append(now)


class Seen(keras.callbacks.Callback):
    """The weights at the hooks of other callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[str, list[Weights]] = {}

    def _note(self, hook: str) -> None:
        self.at.setdefault(hook, []).append(weights(self.model))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._note("epoch_begin")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._note("epoch_end")

    def on_test_begin(self, logs: Any = None) -> None:
        self._note("test_begin")

    def on_predict_begin(self, logs: Any = None) -> None:
        self._note("predict_begin")


_recorded: dict[tuple[str, int], Recorder] = {}


def recorded(kind: str = "plain", epochs: int = 2) -> Recorder:
    """A run without any average, of the same model: to be called before ``model_of``."""
    if (kind, epochs) not in _recorded:
        recorder = Recorder()
        fit(model_of(kind), recorder, epochs=epochs)
        assert all(np.isfinite(one.astype(np.float64)).all() for one in recorder.steps[-1].values())
        _recorded[kind, epochs] = recorder
    return _recorded[kind, epochs]


def expected(
    run: Recorder, decay: Callable[[int], float] = lambda n: DECAY, steps: slice = slice(None)
) -> Weights:
    """The recursion in float64; what is not trained is that of the last step."""
    avg = {name: one.astype(np.float64) for name, one in run.start.items()}
    names = [name for name in avg if "moving" not in name]
    taken = run.steps[steps]
    for n, step in enumerate(taken, 1):
        for name in names:
            avg[name] += (1 - decay(n)) * (step[name] - avg[name])
    last = taken[-1]
    return {name: one if name in names else last[name] for name, one in avg.items()}


# -- updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["constant", "warmup"])
def test_average_is_the_recursion_over_all_steps(rule: str) -> None:
    run = recorded()
    decay, of = DECAY, lambda n: DECAY
    if rule == "warmup":
        decay, of = fastema.rules.warmup(DECAY), lambda n: min(DECAY, (1 + n) / (10 + n))
    model, ema = model_of(), EMAWeights(decay)
    fit(model, ema)
    assert ema.ema.num_updates == len(run.steps) == 2 * BATCHES
    assert_near(average(ema), expected(run, of), len(run.steps))
    assert_same(weights(model), run.steps[-1])  # training took no notice


@on_one_backend
def test_default_decay() -> None:
    model, ema = model_of(), EMAWeights()
    fit(model, ema, epochs=1)
    assert ema.ema.decay == 0.999
    assert_near(average(ema), expected(recorded(epochs=1), lambda n: 0.999), BATCHES)


def test_accumulated_gradients_are_one_step() -> None:
    run = recorded("accumulating")
    assert len(run.steps) == 3 < run.batches == 12
    model, ema = model_of("accumulating"), EMAWeights(DECAY)
    fit(model, ema)
    assert ema.ema.num_updates == 3
    assert_near(average(ema), expected(run), 3)


@on_one_backend
def test_keras_averages_every_batch_of_accumulated_gradients() -> None:
    """What EMAWeights is to do better; when Keras does it too, this test may go."""
    keras.utils.set_random_seed(11)
    own = build(
        keras.optimizers.SGD(0.1, gradient_accumulation_steps=4, use_ema=True, ema_momentum=DECAY)
    )
    own.set_weights(model_of("accumulating").get_weights())
    seen: list[Weights] = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            averages = self.model.optimizer._model_variables_moving_average
            names = [one.path.removeprefix("net/") for one in self.model.trainable_weights]
            values = [np.array(keras.ops.convert_to_numpy(one)) for one in averages]
            seen.append(dict(zip(names, values, strict=True)))

    fit(own, Look(), validation_data=None)
    run = recorded("accumulating")
    want = {name: one for name, one in expected(run).items() if "moving" not in name}
    assert all(np.abs(seen[-1][name] - want[name]).max() > 1e-3 for name in want)


def test_an_execution_of_several_steps_keeps_the_horizon() -> None:
    if BACKEND == "torch":
        with pytest.raises(ValueError, match="steps_per_execution"):
            fit(model_of("several"), EMAWeights(DECAY))
        return
    run = recorded("several")  # executions of 4 and 2 steps
    assert len(run.steps) == 4
    model, ema = model_of("several"), EMAWeights(DECAY)
    fit(model, ema)
    assert ema.ema.num_updates == 12
    passed = [4, 2, 4, 2]
    assert_near(average(ema), expected(run, lambda n: DECAY ** passed[n - 1]), 12)


def test_steps_that_a_loss_scale_leaves_out_are_none() -> None:
    run = recorded("scaled")
    assert 0 < len(run.steps) < run.batches
    model, ema = model_of("scaled"), EMAWeights(DECAY)
    fit(model, ema)
    assert ema.ema.num_updates == len(run.steps) == int(model.optimizer.iterations)
    assert_near(average(ema), expected(run), len(run.steps))


def test_steps_of_a_train_step_of_the_users_own() -> None:
    class Twice(keras.Sequential):
        def train_step(self, *arguments: Any) -> Any:
            if BACKEND == "jax":
                _, state = super().train_step(*arguments)
                return super().train_step(state, *arguments[1:])
            super().train_step(*arguments)
            return super().train_step(*arguments)

    model = Twice([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    ema = EMAWeights(DECAY)
    model.fit(X, Y, batch_size=BATCH, verbose=0, callbacks=[ema])
    assert ema.ema.num_updates == 2 * BATCHES


@pytest.mark.parametrize("kind", ["own step", "accumulating", "accumulating more"])
def test_data_that_run_out_are_no_step(kind: str) -> None:
    """TensorFlow counts one as it finds that there is no batch left, where it has to find out."""
    if BACKEND != "tensorflow":
        return
    import tensorflow as tf

    class Own(keras.Sequential):
        def train_step(self, data: Any) -> Any:
            return super().train_step(data)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(X), BATCH):
            yield X[first : first + BATCH], Y[first : first + BATCH]

    keras.utils.set_random_seed(4)
    # The step that was none is the seventh: one that would have changed the weights, with seven.
    k = {"own step": None, "accumulating": 4, "accumulating more": 7}[kind]
    layers = [keras.Input((4,)), keras.layers.Dense(1, "tanh", name="last")]
    model = (Own if kind == "own step" else keras.Sequential)(layers, name="net")
    model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=k), "mse")
    signature = tf.TensorSpec((None, 4)), tf.TensorSpec((None, 1))
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    run, ema = Recorder(), EMAWeights(DECAY)
    model.fit(data, epochs=5, shuffle=False, verbose=0, callbacks=[run, ema])
    assert int(model.optimizer._iterations) == 5 * (BATCHES + 1)  # what is not to be counted
    assert ema.ema.num_updates == len(run.steps) == {None: 30, 4: 7, 7: 0}[k]
    assert_near(average(ema), expected(run) if run.steps else run.start, max(len(run.steps), 1))


def test_steps_of_several_optimizers() -> None:
    for k, of_last in ((2, 3), (3, 2)):
        most, last = (keras.optimizers.SGD(gradient_accumulation_steps=n) for n in (k, of_last))
        parts = keras.optimizers.OptimizerMap(most)
        parts["net/last/.*"] = last
        model = build(keras.optimizers.MultiOptimizer(parts))
        ema = EMAWeights(DECAY)
        fit(model, ema, epochs=1)
        assert ema.ema.num_updates == BATCHES // 2


def test_a_second_fit_goes_on() -> None:
    run = recorded()
    model, ema = model_of(), EMAWeights(DECAY)
    fit(model, ema, epochs=1)
    fit(model, ema, epochs=1)
    assert ema.ema.num_updates == 2 * BATCHES
    assert_near(average(ema), expected(run), len(run.steps))


def test_an_average_of_a_model_is_updated_without_giving_the_model_again() -> None:
    model = model_of()
    ema, want = fastema.EMA(model, DECAY), weights(model)
    names = [one.path.removeprefix("net/") for one in model.trainable_weights]
    want = {name: want[name].astype(np.float64) for name in names}
    for step in range(6):
        if step % 3:  # the other times the weights are those of before
            model.train_on_batch(X[:BATCH], Y[:BATCH])
        synced(model)
        ema.update()
        for name, one in weights(model).items():
            if name in want:
                want[name] += (1 - DECAY) * (one - want[name])
    assert ema.num_updates == 6
    assert_near({n: np.array(keras.ops.convert_to_numpy(ema.shadow[n])) for n in names}, want, 6)


def test_training_of_batches_by_hand() -> None:
    model, ema = model_of("accumulating"), EMAWeights(DECAY)
    run = Recorder()
    run.set_model(model)
    run.on_train_begin()
    ema.set_model(model)
    ema.update()
    for first in range(0, len(X), BATCH):
        model.train_on_batch(X[first : first + BATCH], Y[first : first + BATCH])
        run.on_train_batch_end(0)
        ema.update()
        ema.update()  # no step since
    assert ema.ema.num_updates == len(run.steps) == 1
    want = expected(run)
    assert_near(average(ema), {n: want[n] for n in trained(model)}, 1)


def test_a_callback_that_syncs_the_state_of_jax_disturbs_nothing() -> None:
    run = recorded()
    for order in (lambda a, b: (a, b), lambda a, b: (b, a)):
        model, ema = model_of(), EMAWeights(DECAY)
        fit(model, *order(ema, Recorder()))
        assert_near(average(ema), expected(run), len(run.steps))
        assert_same(weights(model), run.steps[-1])


def test_a_model_of_unknown_input_begins_when_it_has_weights() -> None:
    keras.utils.set_random_seed(3)
    model = build(known=False)
    ema, run = EMAWeights(DECAY), Recorder()

    class Late(Recorder):
        def on_train_begin(self, logs: Any = None) -> None:
            self.start, self.steps, self.batches = {}, [], 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.steps.append(weights(self.model))

    late = Late()
    fit(model, late, ema, *([] if BACKEND == "tensorflow" else [run]), epochs=1)
    assert ema.ema.num_updates == BATCHES
    if BACKEND == "tensorflow":  # it had none before the first step was done
        late.start, late.steps = late.steps[0], late.steps[1:]
        run = late
    assert_near(average(ema), expected(run), BATCHES)


@on_one_backend
def test_options_reach_the_average() -> None:
    model = model_of("bfloat16")
    ema = EMAWeights(DECAY, shadow_dtype="float32", update_every=2, on_nonfinite="skip")
    fit(model, ema, epochs=1)
    assert {one.dtype.name for n, one in average(ema).items() if n in trained(model)} == {"float32"}
    assert ema.ema.schedule.update_every == 2
    assert ema.ema.num_updates == BATCHES


# -- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "bfloat16"])
def test_validation_runs_with_the_average(kind: str) -> None:
    run = recorded(kind, epochs=1)
    model, ema, seen = model_of(kind), EMAWeights(DECAY, shadow_dtype="float32"), Seen()
    history = fit(model, ema, seen, epochs=1).history
    assert not ema.applied
    assert_same(weights(model), run.steps[-1])
    assert_same(seen.at["epoch_end"][0], run.steps[-1])
    (during,) = seen.at["test_begin"]
    bound = 2.0**-8 if kind == "bfloat16" else 0.0
    for name, value in average(ema).items():
        got, want = during[name].astype(np.float64), value.astype(np.float64)
        np.testing.assert_allclose(got, want, rtol=bound, atol=0, err_msg=name)
    assert not differ({n: during[n] for n in during if "moving" in n}, run.steps[-1])
    other = model_of(kind)
    other.set_weights([during[one.path.removeprefix("net/")] for one in other.weights])
    assert other.evaluate(XV, YV, batch_size=BATCH, verbose=0) == history["val_loss"][0]


def test_evaluate_and_predict_with_the_average_and_every_bit_comes_back() -> None:
    model, ema, seen = model_of(), EMAWeights(DECAY), Seen()
    fit(model, ema, validation_data=None)
    raw, avg = weights(model), average(ema)
    assert differ({n: raw[n] for n in trained(model)}, {n: avg[n] for n in trained(model)})
    loss = model.evaluate(XV, YV, verbose=0, callbacks=[ema, seen])
    output = model.predict(XV, verbose=0, callbacks=[ema, seen])
    assert_same(seen.at["test_begin"][0], avg)
    assert_same(seen.at["predict_begin"][0], avg)
    assert_same(weights(model), raw)
    assert_same(average(ema), avg)
    assert model.predict(XV, verbose=0).tobytes() != output.tobytes()
    with ema.swapped():
        assert ema.applied
        assert_same(weights(model), avg)
        assert model.evaluate(XV, YV, verbose=0) == loss
        assert model.evaluate(XV, YV, verbose=0, callbacks=[ema]) == loss
        with ema.swapped():
            assert_same(weights(model), avg)
        assert_same(weights(model), avg)
        assert model.predict(XV, verbose=0, callbacks=[ema]).tobytes() == output.tobytes()
        assert_same(weights(model), avg)
    assert_same(weights(model), raw)
    assert_same(average(ema), avg)


def around_keras_own_swap(call: Callable[[Any, Any], object]) -> tuple[Any, Weights, Weights]:
    """A model with Keras' own average, and its weights before and after a call in fit."""
    model = build(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=DECAY))
    swap = keras.callbacks.SwapEMAWeights()
    kept: list[Weights] = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            before = weights(self.model)
            call(self.model, swap)
            kept.extend([before, weights(self.model)])

    fit(model, Look(), epochs=1, validation_data=None)
    before, after = kept
    return model, before, after


@on_one_backend
def test_keras_leaves_its_average_in_the_model_after_predict() -> None:
    """What EMAWeights is to do better; when Keras does it too, this test may go."""
    model, *kept = around_keras_own_swap(
        lambda model, swap: model.predict(XV, verbose=0, callbacks=[swap])
    )
    assert differ(*[{n: one[n] for n in trained(model)} for one in kept])


def test_keras_perturbs_weights_by_its_swap_on_tensorflow() -> None:
    """What EMAWeights is to do better; when Keras does it too, this test may go."""
    model, before, after = around_keras_own_swap(
        lambda model, swap: model.evaluate(XV, YV, verbose=0, callbacks=[swap])
    )
    if BACKEND == "tensorflow":
        assert any(before[name].tobytes() != after[name].tobytes() for name in trained(model))
    else:
        assert_same(after, before)


def batches_without_end_known() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, len(XV), BATCH):
        yield XV[first : first + BATCH], YV[first : first + BATCH]


def test_data_of_unknown_length() -> None:
    model, ema, seen = model_of(), EMAWeights(DECAY), Seen()
    fit(model, ema, validation_data=None, epochs=1)
    raw, avg = weights(model), average(ema)

    class Last(keras.callbacks.Callback):
        def on_test_end(self, logs: Any = None) -> None:
            seen._note("test_end")

    last = Last()
    seen.set_model(model)
    got = model.evaluate(batches_without_end_known(), verbose=0, callbacks=[last, ema])
    assert_same(seen.at["test_end"][0], avg)
    assert_same(weights(model), raw)
    with ema.swapped():
        assert model.evaluate(XV, YV, batch_size=BATCH, verbose=0) == pytest.approx(got, rel=1e-6)


@pytest.mark.parametrize("buffers", ["copy", "average", "skip"])
def test_statistics_of_batch_normalisation(buffers: Any) -> None:
    run = recorded(epochs=1)
    model, ema, seen = model_of(), EMAWeights(DECAY, buffers=buffers), Seen()
    fit(model, ema, seen, epochs=1)
    (during,) = seen.at["test_begin"]
    moving = {name for name in during if "moving" in name}
    avg = {name: run.start[name].astype(np.float64) for name in moving}
    for step in run.steps:
        for name in moving:
            avg[name] += (1 - DECAY) * (step[name] - avg[name])
    if buffers == "average":
        assert_near({n: during[n] for n in moving}, avg, BATCHES)
    else:
        assert_same({n: during[n] for n in moving}, {n: run.steps[-1][n] for n in moving})
    assert (moving & average(ema).keys() == set()) == (buffers == "skip")
    assert_same(weights(model), run.steps[-1])


def test_frozen_layers_stay_as_they_are() -> None:
    keras.utils.set_random_seed(2)
    model = build()
    model.get_layer("first").trainable = False
    model.compile("sgd", "mse")
    before, ema, seen = weights(model), EMAWeights(DECAY), Seen()
    fit(model, ema, seen, epochs=1)
    assert not {"first/kernel", "first/bias"} & average(ema).keys()
    for found in (weights(model), *seen.at["test_begin"]):
        assert found["first/kernel"].tobytes() == before["first/kernel"].tobytes()


@on_one_backend
def test_one_of_several_averages_is_evaluated() -> None:
    run = recorded(epochs=1)
    model, ema, seen = model_of(), EMAWeights((0.5, DECAY), which=1), Seen()
    fit(model, ema, seen, epochs=1)
    (during,) = seen.at["test_begin"]
    assert_near(during, expected(run), BATCHES)
    assert_near(average(ema, 0), expected(run, lambda n: 0.5), BATCHES)
    assert_same(weights(model), run.steps[-1])


# -- exceptions -----------------------------------------------------------------------------------


class Failing(keras.callbacks.Callback):
    """Raises at one hook, after so many calls."""

    def __init__(self, error: type[BaseException], calls: int) -> None:
        super().__init__()
        self.error, self.left = error, calls

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error("planted")

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._count()

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        self._count()


class Data(keras.utils.PyDataset):
    """Batches of which one cannot be had."""

    def __init__(self, error: type[BaseException], good: int, only_x: bool = False) -> None:
        super().__init__()
        self.error, self.good, self.only_x = error, good, only_x

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        if index >= self.good:
            raise self.error("planted")
        x, y = XV[:BATCH], YV[:BATCH]
        return x if self.only_x else (x, y)


ERRORS = [OSError, KeyboardInterrupt]


def untouched(model: Any, name: str) -> bool:
    """Whether a function of the model is its own again."""
    return type(vars(model).get(name)).__module__ != "fastema.keras.guards"


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("where", ["callback before", "callback after", "data"])
def test_an_error_in_the_validation_of_fit(where: str, good: int, error: Any) -> None:
    if where == "data" and error is KeyboardInterrupt and BACKEND == "tensorflow":
        error = MemoryError  # TensorFlow turns what a generator raises into its own errors
    run = recorded(epochs=1)
    model, ema = model_of(), EMAWeights(DECAY)
    failing = [Failing(error, good)] if "callback" in where else []
    callbacks = [*failing, ema] if "before" in where else [ema, *failing]
    data = Data(error, good) if where == "data" else (XV, YV)
    with pytest.raises(BaseException, match="planted"):
        fit(model, *callbacks, validation_data=data, validation_batch_size=BATCH)
    assert not ema.applied
    assert_same(weights(model), run.steps[-1])
    assert_near(average(ema), expected(run), BATCHES)
    assert untouched(model, "test_function")
    after = model.evaluate(XV, YV, verbose=0)
    fit(model, ema, epochs=1)  # and it goes on
    assert ema.ema.num_updates == 2 * BATCHES
    assert np.isfinite(after)


@pytest.mark.parametrize("call", ["validation", "evaluate", "predict"])
def test_an_error_of_the_model(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ema = model_of("eager"), EMAWeights(DECAY)
    fit(model, ema, epochs=1, validation_data=None)
    raw, avg = weights(model), average(ema)
    calls = iter(range(100))
    inner = type(model).call

    def failing(self: Any, *arguments: Any, training: bool = False, **options: Any) -> Any:
        if not training and next(calls) == 1:
            raise ZeroDivisionError("planted")
        return inner(self, *arguments, training=training, **options)

    options = {"batch_size": BATCH, "verbose": 0, "callbacks": [ema]}
    calls_of = {
        "predict": lambda: model.predict(XV, **options),
        "evaluate": lambda: model.evaluate(XV, YV, **options),
        "validation": lambda: fit(model, ema, epochs=1, validation_batch_size=BATCH),
    }
    monkeypatch.setattr(type(model), "call", failing)
    with pytest.raises(ZeroDivisionError, match="planted"):
        calls_of[call]()
    monkeypatch.undo()
    assert not ema.applied
    assert untouched(model, "test_function")
    assert untouched(model, "predict_function")
    if call != "validation":
        assert_same(weights(model), raw)
        assert_same(average(ema), avg)
    else:
        assert ema.ema.num_updates == 2 * BATCHES
        assert differ({n: weights(model)[n] for n in trained(model)}, average(ema))
    model.predict(XV, verbose=0)


@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("call", ["evaluate", "fit"])
def test_an_error_within_what_jax_compiled(call: str, good: int) -> None:
    """Whose arguments were donated by then, the state of random numbers among them."""
    if BACKEND != "jax":
        return  # elsewhere a computation does not take its arguments' memory
    import jax

    calls = [-1]

    class Bomb(keras.layers.Layer):
        def call(self, x: Any, training: bool = False) -> Any:
            def host(array: Any) -> Any:
                calls[0] -= 1
                if calls[0] == -1:
                    raise ZeroDivisionError("planted")
                return np.asarray(array)

            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return x if training else jax.pure_callback(host, shape, x)

    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(3), keras.layers.Dropout(0.25), Bomb(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers], name="net")
    model.compile("sgd", "mse")
    ema = EMAWeights(DECAY)
    fit(model, ema, epochs=1, validation_data=None)
    raw, avg = weights(model), average(ema)
    calls[0] = good
    fails = {
        "fit": lambda: fit(model, ema, epochs=1, validation_batch_size=BATCH),
        "evaluate": lambda: model.evaluate(XV, YV, batch_size=BATCH, verbose=0, callbacks=[ema]),
    }
    with pytest.raises(Exception, match=r"planted|NoneType"):  # Keras may fail in what follows
        fails[call]()
    assert calls[0] < 0
    assert not ema.applied
    if call == "evaluate":
        assert_same(weights(model), raw)
        assert_same(average(ema), avg)
    calls[0] = -2
    before = ema.ema.num_updates
    fit(model, ema, epochs=1)
    assert ema.ema.num_updates == before + BATCHES
    assert all(np.isfinite(one).all() for one in weights(model).values())


@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("call", ["evaluate", "predict"])
@pytest.mark.parametrize("where", ["callback", "data"])
def test_an_error_that_a_call_of_its_own_does_not_tell(where: str, call: str, good: int) -> None:
    model, ema = model_of(), EMAWeights(DECAY)
    fit(model, ema, epochs=1, validation_data=None)
    raw, avg = weights(model), average(ema)
    data = {"x": XV, "batch_size": BATCH}
    if where == "data":
        data = {"x": Data(OSError, good, call == "predict")}
    elif call == "evaluate":
        data["y"] = YV
    callbacks = [ema, *([Failing(OSError, good)] if where == "callback" else [])]

    def fails() -> None:
        with pytest.raises(BaseException, match="planted"):
            getattr(model, call)(**data, verbose=0, callbacks=callbacks)
        for one in callbacks[1:]:
            one.left = good

    fails()
    if where == "data" and BACKEND == "jax":
        assert not ema.applied
    ema.restore()
    assert not ema.applied
    assert_same(weights(model), raw)
    assert_same(average(ema), avg)
    # The next hook does it too.
    fails()
    loss = model.evaluate(XV, YV, verbose=0, callbacks=[ema])
    assert not ema.applied
    assert_same(weights(model), raw)
    assert_same(average(ema), avg)
    assert untouched(model, "test_function")
    assert untouched(model, "predict_function")
    # And a block always.
    with pytest.raises(BaseException, match="planted"), ema.swapped():
        getattr(model, call)(**data, verbose=0, callbacks=callbacks[1:])
    assert_same(weights(model), raw)
    assert_same(average(ema), avg)
    with ema.swapped():
        assert model.evaluate(XV, YV, verbose=0) == loss


@pytest.mark.parametrize("same", [False, True])
def test_fit_after_an_evaluation_that_failed_trains_the_weights(same: bool) -> None:
    run = recorded()
    model, ema = model_of(), EMAWeights(DECAY)
    fit(model, ema, epochs=1)
    with pytest.raises(OSError, match="planted"):
        model.evaluate(XV, YV, verbose=0, callbacks=[ema, Failing(OSError, 0)])
    # Another callback takes out of the model what the first one left there.
    fit(model, ema if same else EMAWeights(DECAY), epochs=1)
    assert_same(weights(model), run.steps[-1])
    assert not ema.applied
    assert_near(average(ema), expected(run, steps=slice(None if same else BATCHES)), 2 * BATCHES)


class Breaks(keras.callbacks.Callback):
    """Raises at a hook of a fit, the second time."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self._raises)
        self._left = 1 if hook == "on_epoch_begin" else 0

    def _raises(self, *_: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise OSError("planted")


USES: dict[str, Callable[[Any, Path], object]] = {
    "fit": lambda model, path: fit(model, epochs=1, validation_data=None),
    "train_on_batch": lambda model, path: model.train_on_batch(X[:BATCH], Y[:BATCH]),
    "evaluate": lambda model, path: [model.evaluate(XV, YV, verbose=0)],
    "predict": lambda model, path: model.predict(XV, verbose=0),
    "save": lambda model, path: model.save(path / "model.keras"),
    "save_weights": lambda model, path: model.save_weights(path / "model.weights.h5"),
    "get_weights": lambda model, path: model.get_weights(),
    "set_weights": lambda model, path: model.set_weights([2 * one for one in model.get_weights()]),
}


@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_train_end"])
@pytest.mark.parametrize("use", USES)
def test_a_model_that_an_error_left_with_the_average_has_its_weights_when_it_is_used(
    hook: str, use: str, tmp_path: Path
) -> None:
    model = model_of()
    fit(model, epochs=1, validation_data=None)
    raw, twin = weights(model), USES[use]
    if use != "set_weights":
        want_result = twin(model, tmp_path)
    want = weights(model)
    model, ema = model_of(), EMAWeights(DECAY, swap_on_epoch=True)
    epochs = 2 if hook == "on_epoch_begin" else 1
    with pytest.raises(OSError, match="planted"):
        fit(model, Breaks(hook), ema, epochs=epochs, validation_data=None)
    assert ema.applied
    assert_same(weights(model), average(ema))
    if use == "set_weights":  # what is written stays
        model.set_weights([2 * raw[one.path.removeprefix("net/")] for one in model.weights])
        want = {name: 2 * one for name, one in raw.items()}
    elif use in ("evaluate", "predict", "get_weights"):
        for one, other in zip(twin(model, tmp_path), want_result, strict=True):
            np.testing.assert_array_equal(one, other)
    else:
        twin(model, tmp_path)
    assert not ema.applied
    assert_same(weights(model), want)
    ema.restore()
    assert_same(weights(model), want)
    if use == "save_weights":
        assert_same(loaded(tmp_path / "model.weights.h5"), raw)
    assert all(untouched(model, name) for name in USES if name != "evaluate")


def test_the_average_outlives_its_callback_where_the_model_holds_it() -> None:
    model = model_of()
    fit(model, epochs=1, validation_data=None)
    raw = weights(model)
    model = model_of()
    with pytest.raises(OSError, match="planted"):
        fit(
            model, Breaks("on_train_end"), EMAWeights(DECAY, swap_on_epoch=True), epochs=1,
            validation_data=None,
        )  # fmt: skip
    gc.collect()
    model.predict(XV, verbose=0)
    assert_same(weights(model), raw)


def test_a_block_refuses_what_would_train_or_overwrite_the_average(tmp_path: Path) -> None:
    model, ema = model_of(), EMAWeights(DECAY)
    fit(model, ema, epochs=1, validation_data=None)
    raw, avg = weights(model), average(ema)
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    with ema.swapped():
        for name in ("fit", "train_on_batch", "set_weights"):
            with pytest.raises(StateError, match=f"{name} while the model holds the average"):
                USES[name](model, tmp_path)
        with pytest.raises(StateError, match="load_weights while the model holds the average"):
            model.load_weights(path)
        assert_same(weights(model), avg)
    assert_same(weights(model), raw)
    assert_same(average(ema), avg)
    model.load_weights(path)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="only PyTorch counts writes")
@pytest.mark.parametrize("raised", [None, ValueError("mine")], ids=["write", "write and raise"])
def test_a_write_in_a_block_is_told_once_the_callback_is_ready_again(raised: Any) -> None:
    model, ema = model_of(), EMAWeights(DECAY)
    fit(model, ema)
    raw = [np.array(keras.ops.convert_to_numpy(one)) for one in model.weights]
    kind = StateError if raised is None else ValueError

    def write() -> None:
        with ema.swapped():
            model.layers[-1].kernel.assign(np.ones((6, 1)))
            if raised is not None:
                raise raised

    with pytest.raises(kind):
        write()
    assert not ema.applied
    for one, before in zip(model.weights, raw, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(one), before)
    with ema.swapped():
        assert ema.applied
    fit(model, ema, epochs=1)


def test_a_prediction_within_an_evaluation_is_of_the_average_too() -> None:
    model, ema, seen = model_of(), EMAWeights(DECAY), Seen()
    fit(model, ema, epochs=1, validation_data=None)
    avg = average(ema)

    class Predicts(keras.callbacks.Callback):
        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            if BACKEND != "jax":  # whose model has no weights within an evaluation
                self.model.predict(XV, verbose=0)

        def on_test_end(self, logs: Any = None) -> None:
            seen._note("test_end")

    seen.set_model(model)
    model.evaluate(XV, YV, batch_size=BATCH, verbose=0, callbacks=[Predicts(), ema])
    assert_same(seen.at["test_end"][0], avg)


# -- other callbacks ------------------------------------------------------------------------------


def test_swap_on_epoch_shows_the_average_to_later_callbacks() -> None:
    run = recorded()
    model, ema = model_of(), EMAWeights(DECAY, swap_on_epoch=True)
    before, after, wrote = Seen(), Seen(), []

    class Writes(keras.callbacks.Callback):
        def on_train_end(self, logs: Any = None) -> None:
            wrote.append(weights(self.model))

    fit(model, before, ema, after, Writes())
    for epoch, last in enumerate([BATCHES, 2 * BATCHES]):
        assert_same(before.at["epoch_end"][epoch], run.steps[last - 1])
        assert_near(after.at["epoch_end"][epoch], expected(run, steps=slice(last)), last)
    assert_same(after.at["epoch_begin"][1], run.steps[BATCHES - 1])
    assert_same(weights(model), run.steps[-1])
    assert_same(wrote[0], run.steps[-1])
    assert not ema.applied


def test_the_average_is_left_by_a_callback_that_fails_at_the_end_of_an_epoch() -> None:
    run = recorded(epochs=1)
    model, ema = model_of(), EMAWeights(DECAY, swap_on_epoch=True)

    class Full(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fit(model, ema, Full())
    assert ema.applied
    assert_near(weights(model), expected(run), BATCHES)
    with pytest.raises(StateError, match="restore"):
        ema.update()
    ema.restore()
    assert_same(weights(model), run.steps[-1])


def loaded(path: Path) -> Weights:
    other = model_of("other")
    other.load_weights(path)
    return weights(other)


@on_one_backend
@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_what_a_model_checkpoint_saves(tmp_path: Path, swap_on_epoch: bool) -> None:
    run = recorded()
    model, ema = model_of(), EMAWeights(DECAY, swap_on_epoch=swap_on_epoch)
    names = ["before", "after"]
    before, after = (
        keras.callbacks.ModelCheckpoint(
            os.fspath(tmp_path / f"{name}-{{epoch}}.weights.h5"), save_weights_only=True
        )
        for name in names
    )
    fit(model, before, ema, after)
    for epoch, last in ((1, BATCHES), (2, 2 * BATCHES)):
        assert_same(loaded(tmp_path / f"before-{epoch}.weights.h5"), run.steps[last - 1])
        found = loaded(tmp_path / f"after-{epoch}.weights.h5")
        if swap_on_epoch:
            assert_near(found, expected(run, steps=slice(last)), last)
        else:
            assert_same(found, run.steps[last - 1])


def losses_of_the_average(run: Recorder, epochs: int) -> list[float]:
    model, found = model_of("other"), []
    for epoch in range(1, epochs + 1):
        avg = expected(run, steps=slice(epoch * BATCHES))
        model.set_weights([avg[one.path.removeprefix("net/")] for one in model.weights])
        found.append(model.evaluate(XV, YV, batch_size=BATCH, verbose=0))
    return found


@on_one_backend
def test_the_best_epoch_is_that_of_the_average(tmp_path: Path) -> None:
    epochs = 4
    run = recorded(epochs=epochs)
    losses = losses_of_the_average(run, epochs)
    best = int(np.argmax(losses)) + 1
    assert best < epochs  # for the sake of the test the best is the worst, which is not the last
    model, ema = model_of(), EMAWeights(DECAY, swap_on_epoch=True)
    path = os.fspath(tmp_path / "best.weights.h5")
    saving = keras.callbacks.ModelCheckpoint(
        path, save_weights_only=True, save_best_only=True, monitor="val_loss", mode="max"
    )
    stopping = keras.callbacks.EarlyStopping(patience=epochs, restore_best_weights=True, mode="max")
    history = fit(model, ema, saving, stopping, epochs=epochs).history
    np.testing.assert_allclose(history["val_loss"], losses, rtol=1e-4)
    want = expected(run, steps=slice(best * BATCHES))
    assert_near(loaded(Path(path)), want, best * BATCHES)
    assert_near(weights(model), want, best * BATCHES)  # early stopping wrote it at the end
    assert not ema.applied


@on_one_backend
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_early_stopping_and_the_order(swap_on_epoch: bool, first: bool) -> None:
    epochs = 4
    run = recorded(epochs=epochs)
    losses = losses_of_the_average(run, epochs)
    best = int(np.argmax(losses)) + 1
    assert best < epochs  # for the sake of the test the best is the worst, which is not the last
    model, ema = model_of(), EMAWeights(DECAY, swap_on_epoch=swap_on_epoch)
    stopping = keras.callbacks.EarlyStopping(patience=epochs, restore_best_weights=True, mode="max")
    fit(model, *([stopping, ema] if first else [ema, stopping]), epochs=epochs)
    if swap_on_epoch and not first:
        assert_near(weights(model), expected(run, steps=slice(best * BATCHES)), best * BATCHES)
    else:
        assert_same(weights(model), run.steps[best * BATCHES - 1])
    assert_near(average(ema), expected(run), epochs * BATCHES)  # whatever was written elsewhere


class Interrupts(keras.callbacks.Callback):
    def __init__(self, batch: int, epoch: int) -> None:
        super().__init__()
        self.when = (epoch, batch)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self.epoch, batch) == self.when:
            raise KeyboardInterrupt


OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"shadow_dtype": "bfloat16", "seed": 7},
    "bf16+16": {"shadow_dtype": "bf16+16"},
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", OPTIONS)
def test_a_resumed_run_is_to_the_bit_that_of_one_piece(
    tmp_path: Path, dtype: str, first: bool
) -> None:
    def callbacks(folder: str) -> tuple[EMAWeights, list[Any]]:
        ema = EMAWeights(
            fastema.rules.warmup(0.9),
            backup=tmp_path / folder / "average.safetensors",
            **OPTIONS[dtype],
        )
        backup = keras.callbacks.BackupAndRestore(os.fspath(tmp_path / folder / "model"))
        return ema, [ema, backup] if first else [backup, ema]

    model = model_of("resumable")
    whole, both = callbacks("whole")
    fit(model, *both, epochs=3)
    want_weights, want = weights(model), average(whole)

    model = model_of("resumable")
    ended, both = callbacks("parts")
    with pytest.raises(KeyboardInterrupt):
        fit(model, *both, Interrupts(2, epoch=2), epochs=3)
    assert ended.ema.num_updates == 2 * BATCHES + 3
    for again in ("new objects", "the same objects"):
        if again == "new objects":
            model = model_of("resumable")
            ema, both = callbacks("parts")
        else:
            with pytest.raises(KeyboardInterrupt):
                fit(model, *both, Interrupts(1, epoch=2), epochs=3)
        if again == "new objects":
            with pytest.raises(KeyboardInterrupt):
                fit(model, *both, Interrupts(4, epoch=2), epochs=3)
    fit(model, *both, epochs=3)
    assert ema.ema.num_updates == 3 * BATCHES
    assert_same(average(ema), want)
    assert_same(weights(model), want_weights)


def test_a_run_that_ended_between_two_backups(tmp_path: Path) -> None:
    path = tmp_path / "new" / "average.safetensors"
    model = model_of("resumable")
    folder = os.fspath(tmp_path / "model")
    whole = EMAWeights(DECAY)
    fit(model, whole, epochs=3)
    want = average(whole)

    class Ends(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                raise KeyboardInterrupt

    model = model_of("resumable")
    parts = [EMAWeights(DECAY, backup=path), Ends(), keras.callbacks.BackupAndRestore(folder)]
    with pytest.raises(KeyboardInterrupt):
        fit(model, *parts, epochs=3)  # the average is of epoch 2, the model of epoch 1
    model, ema = model_of("resumable"), EMAWeights(DECAY, backup=path)
    fit(model, ema, keras.callbacks.BackupAndRestore(folder), epochs=3)
    assert_same(average(ema), want)
    assert {one.name for one in path.parent.iterdir()} == {
        "average.safetensors",
        "average.previous.safetensors",
    }


def test_a_run_that_was_at_its_end_is_not_trained_again(tmp_path: Path) -> None:
    backup, path = tmp_path / "average.safetensors", tmp_path / "average.weights.h5"
    model, ema = model_of("resumable"), EMAWeights(DECAY, backup=backup)
    fit(model, ema, epochs=2)
    want = average(ema)
    again = EMAWeights(DECAY, backup=backup, save_path=path)
    fit(model, again, epochs=2, initial_epoch=2)
    assert_same(average(again), want)
    assert_same(loaded(path), want)


@on_one_backend
def test_a_backup_that_does_not_belong_to_the_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "average.safetensors"
    fit(model_of(), EMAWeights(DECAY, backup=path))
    model = model_of()
    before = weights(model)
    with pytest.raises(CheckpointError, match=r"at step 0(.|\n)* of step 12(.|\n)* of step 6"):
        fit(model, EMAWeights(DECAY, backup=path))
    assert_same(weights(model), before)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="first")])
    model.compile("sgd", "mse")
    model.optimizer.iterations.assign(12)
    with pytest.raises(CheckpointError, match=r"last/kernel.*unexpected"):
        model.fit(X, np.tile(Y, 2), verbose=0, callbacks=[EMAWeights(DECAY, backup=path)])
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="cut short"):
        fit(model_of(), EMAWeights(DECAY, backup=path))


# -- saving ---------------------------------------------------------------------------------------


def test_saved_weights_are_the_average(tmp_path: Path) -> None:
    path = tmp_path / "new" / "average.weights.h5"
    run = recorded(epochs=1)
    model, ema = model_of(), EMAWeights(DECAY, save_path=path)
    fit(model, ema, epochs=1)
    assert_same(weights(model), run.steps[-1])
    avg = average(ema)
    assert_same(loaded(path), avg)
    again = tmp_path / "again.weights.h5"

    class Midway(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                ema.save_weights(again)
                kept.update(average(ema))

    kept: Weights = {}
    fit(model, ema, Midway(), epochs=1)
    assert_same(loaded(again), kept)
    run = recorded()
    model = model_of()
    fit(model, EMAWeights(DECAY), epochs=2)
    assert_same(weights(model), run.steps[-1])


@on_one_backend
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "average.weights.h5"
    path.write_bytes(b"old")
    model, ema = model_of(), EMAWeights(DECAY)
    fit(model, ema, epochs=1)
    raw, avg = weights(model), average(ema)

    def fails(name: str) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "save_weights", lambda model, name: fails(name))
        with pytest.raises(OSError, match="no space left"):
            ema.save_weights(path)
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert_same(weights(model), raw)
    assert_same(average(ema), avg)
    ema.save_weights(path)
    assert_same(loaded(path), avg)
    new, plain = tmp_path / "new.weights.h5", tmp_path / "plain.weights.h5"
    ema.save_weights(new)
    model.save_weights(plain)
    assert new.stat().st_mode == plain.stat().st_mode


@on_one_backend
def test_state_dicts() -> None:
    model, ema = model_of(), EMAWeights(DECAY)
    fit(model, ema, epochs=1)
    state = ema.state_dict()
    fit(model, ema, epochs=1)
    want, raw = average(ema), weights(model)

    model = model_of()
    fit(model, Recorder(), epochs=1)
    other = EMAWeights(0.5)
    other.load_state_dict(state)  # before it knows of a model
    fit(model, other, epochs=1)
    assert_same(weights(model), raw)
    assert_same(average(other), want)

    third = EMAWeights(0.5)
    third.load_state_dict(other.state_dict())
    model.predict(XV, verbose=0, callbacks=[third])
    assert_same(average(third), want)
    state["shadow"][0]["extra"] = state["shadow"][0].pop("last/bias")
    with pytest.raises(CheckpointError, match=r"(?s)last/bias.*missing.*extra.*unexpected"):
        third.load_state_dict(state)
    assert_same(average(third), want)


# -- wrong uses -----------------------------------------------------------------------------------


@on_one_backend
def test_paths_are_looked_at_first() -> None:
    with pytest.raises(ArgumentError, match=r"save_path='a\.h5'.*\.weights\.h5"):
        EMAWeights(save_path="a.h5")
    with pytest.raises(ArgumentError, match=r"backup='a\.npz'.*\.safetensors"):
        EMAWeights(backup="a.npz")
    for decay, which in (((0.9, 0.99), None), ((0.9, 0.99), 2), ((0.9, 0.99), -3), (0.9, 1)):
        with pytest.raises(ArgumentError, match="which"):
            EMAWeights(decay, which=which)


@on_one_backend
def test_nothing_to_show_before_training() -> None:
    ema = EMAWeights(DECAY)
    for call in (lambda: ema.ema, ema.update, ema.state_dict, lambda: ema.save_weights("a.keras")):
        with pytest.raises((StateError, ArgumentError)):
            call()
    model = model_of()
    before = weights(model)
    with pytest.raises(StateError, match="no average yet"):
        model.evaluate(XV, YV, verbose=0, callbacks=[ema])
    assert_same(weights(model), before)


@on_one_backend
def test_bad_options_are_refused_before_training() -> None:
    model = model_of()
    before = weights(model)
    for options in ({"decay": 1.5}, {"buffers": "keep"}, {"shadow_dtype": "int8"}):
        with pytest.raises(fastema.errors.FastemaError):
            fit(model, EMAWeights(**options))
        assert_same(weights(model), before)


@on_one_backend
def test_a_model_without_an_optimizer() -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ema = EMAWeights(DECAY)
    ema.set_model(model)
    with pytest.raises(ArgumentError, match="compile"):
        ema.update()


@on_one_backend
def test_two_averages_in_one_fit_are_refused() -> None:
    model = model_of()
    with pytest.raises(StateError, match="two EMAWeights"):
        fit(model, EMAWeights(0.9), EMAWeights(0.99))
    one, other = EMAWeights(DECAY), EMAWeights(DECAY)
    fit(model, one, epochs=1)
    fit(model, other, epochs=1)  # one after the other is another matter
    with pytest.raises(StateError, match="another EMAWeights"):
        model.evaluate(XV, YV, verbose=0, callbacks=[one, other])
    one.restore()
    raw = weights(model)
    with one.swapped(), pytest.raises(StateError, match="another EMAWeights"), other.swapped():
        pass
    with one.swapped(), pytest.raises(StateError, match="holds the average"):
        fit(model, other)
    assert_same(weights(model), raw)


@on_one_backend
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_average_of_an_average_is_refused(wrapped: bool) -> None:
    optimizer = keras.optimizers.SGD(0.1, use_ema=True)
    model = build(keras.optimizers.LossScaleOptimizer(optimizer) if wrapped else optimizer)
    with pytest.raises(StateError, match="use_ema"):
        fit(model, EMAWeights(DECAY))


@on_one_backend
def test_another_model_is_refused() -> None:
    ema = EMAWeights(DECAY)
    fit(model_of(), ema, epochs=1)
    other = model_of("other")
    for call in (lambda: fit(other, ema), lambda: other.predict(XV, verbose=0, callbacks=[ema])):
        with pytest.raises(StateError, match="another model"):
            call()


def test_no_training_while_the_model_holds_the_average() -> None:
    model, ema = model_of(), EMAWeights(DECAY)
    fit(model, ema, epochs=1)
    raw, state = weights(model), ema.state_dict()
    with ema.swapped():
        with pytest.raises(StateError, match="fit while the model holds the average"):
            fit(model, ema, epochs=1)
        with pytest.raises(StateError, match="update"):
            ema.update()
        with pytest.raises(StateError, match="load_state_dict"):
            ema.load_state_dict(state)
    assert_same(weights(model), raw)


@on_one_backend
def test_hooks_called_by_hand() -> None:
    model, ema = model_of(), EMAWeights(DECAY)
    hooks = keras.callbacks.CallbackList([ema], model=model)
    hooks.on_train_begin()
    hooks.on_epoch_begin(0)
    for first in range(0, len(X), BATCH):
        model.train_on_batch(X[first : first + BATCH], Y[first : first + BATCH])
        hooks.on_train_batch_end(first)
    hooks.on_epoch_end(0)
    hooks.on_train_end()
    assert_near(average(ema), expected(recorded(epochs=1)), BATCHES)
    assert "evaluate" not in vars(model)


def test_a_fit_that_failed_leaves_nothing_behind_the_next() -> None:
    model = model_of()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            fit(model, EMAWeights(DECAY), Interrupts(1, epoch=0))
    fit(model, EMAWeights(DECAY), epochs=1)
    assert "evaluate" not in vars(model)


def test_whole_models_are_saved_in_fit(tmp_path: Path) -> None:
    model, ema = model_of(), EMAWeights(DECAY, swap_on_epoch=True)
    path = tmp_path / "model.keras"
    fit(model, ema, keras.callbacks.ModelCheckpoint(os.fspath(path)), epochs=1)
    found = keras.models.load_model(path)
    assert_same(weights(found), average(ema))
    other = EMAWeights(DECAY)
    fit(found, other, epochs=1)
    assert other.ema.num_updates == BATCHES


def test_a_model_is_given_its_own_functions_back() -> None:
    model, ema = model_of(), EMAWeights(DECAY)
    before = dict(vars(model))
    fit(model, ema, epochs=1)
    model.predict(XV, verbose=0, callbacks=[ema])
    assert "evaluate" not in vars(model)
    assert all(untouched(model, name) for name in before)
    assert keras.models.clone_model(model).name == "net"
