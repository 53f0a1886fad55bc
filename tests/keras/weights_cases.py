"""Tests of fastema.keras on the backend that KERAS_BACKEND names; see test_backends.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import fastema
from fastema.errors import ArgumentError, CheckpointError, FastemaError, StateError
from fastema.keras import EMAWeights

from .backends import on_one_backend
from .data import BACKEND, BATCH, BATCHES, DECAY, MARKS, XV, YV, X, Y, fit
from .models import (
    Weights,
    assert_near,
    assert_same,
    build,
    loaded,
    model_of,
    set_weights,
    synced,
    trained,
    values,
    weights,
)
from .runs import Raising, Recorder, Seen, average, expected, fitted, recorded

pytestmark = MARKS

# -- updates --------------------------------------------------------------------------------------

RULES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "default": ({}, lambda n: 0.999),
    "constant": ({"decay": DECAY}, lambda n: DECAY),
    "warmup": ({"decay": fastema.rules.warmup(DECAY)}, lambda n: min(DECAY, (1 + n) / (10 + n))),
}


@pytest.mark.parametrize("rule", RULES)
def test_average_is_the_recursion_over_all_steps(rule: str) -> None:
    run = recorded()
    options, decay = RULES[rule]
    model, ema = model_of(), EMAWeights(**options)
    fit(model, ema)
    assert ema.ema.num_updates == len(run.steps) == 2 * BATCHES
    assert rule != "default" or ema.ema.decay == 0.999
    assert_near(average(ema), expected(run, decay), len(run.steps))
    assert_same(weights(model), run.steps[-1])  # training took no notice


@pytest.mark.parametrize("how", ["in two fits", "before one that syncs", "after one that syncs"])
def test_average_goes_on_in_a_second_fit_and_beside_a_callback_that_syncs_jax(how: str) -> None:
    run = recorded()
    model, ema = model_of(), EMAWeights(DECAY)
    if how == "in two fits":
        fit(model, ema, epochs=1)
        fit(model, ema, epochs=1)
    else:
        fit(model, *([ema, Recorder()] if "before" in how else [Recorder(), ema]))
    assert ema.ema.num_updates == 2 * BATCHES
    assert_near(average(ema), expected(run), len(run.steps))
    assert_same(weights(model), run.steps[-1])


@pytest.mark.parametrize("kind", ["accumulating", "scaled"])
def test_batches_that_are_no_step_of_the_optimizer_are_not_counted(kind: str) -> None:
    run = recorded(kind)
    steps = len(run.steps)
    assert (steps == 3) if kind == "accumulating" else (0 < steps < run.batches)
    assert run.batches == 12
    model, ema = model_of(kind), EMAWeights(DECAY)
    fit(model, ema)
    assert ema.ema.num_updates == steps
    assert kind != "scaled" or steps == int(model.optimizer.iterations)
    assert_near(average(ema), expected(run), steps)


@on_one_backend
def test_keras_averages_every_batch_of_accumulated_gradients() -> None:
    """What EMAWeights is to do better; when Keras does it too, this test may go."""
    keras.utils.set_random_seed(11)
    own = build(
        keras.optimizers.SGD(0.1, gradient_accumulation_steps=4, use_ema=True, ema_momentum=DECAY)
    )
    own.set_weights(model_of("accumulating").get_weights())
    seen = Seen(lambda model: values(model.optimizer._model_variables_moving_average))
    fit(own, seen, validation_data=None)
    want = trained(own, expected(recorded("accumulating")))
    for found, exact in zip(seen.at["epoch_end"][-1], want.values(), strict=True):
        assert np.abs(found - exact).max() > 1e-3


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
    assert_near(average(ema), expected(run, lambda n: DECAY ** [4, 2, 4, 2][n - 1]), 12)


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


@pytest.mark.parametrize("each", [(2, 3), (3, 2)], ids=str)
def test_steps_of_several_optimizers(each: tuple[int, int]) -> None:
    most, last = (keras.optimizers.SGD(gradient_accumulation_steps=k) for k in each)
    parts = keras.optimizers.OptimizerMap(most)
    parts["net/last/.*"] = last
    ema = EMAWeights(DECAY)
    fit(build(keras.optimizers.MultiOptimizer(parts)), ema, epochs=1)
    assert ema.ema.num_updates == BATCHES // 2


def test_an_average_of_a_model_is_updated_without_giving_the_model_again() -> None:
    model = model_of()
    ema, want = fastema.EMA(model, DECAY), trained(model)
    want = {name: one.astype(np.float64) for name, one in want.items()}
    for step in range(6):
        if step % 3:  # the other times the weights are those of before
            model.train_on_batch(X[:BATCH], Y[:BATCH])
        synced(model)
        ema.update()
        for name, one in trained(model).items():
            want[name] += (1 - DECAY) * (one - want[name])
    assert ema.num_updates == 6
    assert_near(dict(zip(want, values(ema.shadow[name] for name in want), strict=True)), want, 6)


def test_training_of_batches_by_hand() -> None:
    model, ema, run = model_of("accumulating"), EMAWeights(DECAY), Recorder()
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
    assert_near(average(ema), trained(model, expected(run)), 1)


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


def test_a_model_of_unknown_input_begins_when_it_has_weights() -> None:
    keras.utils.set_random_seed(3)
    run, ema = Recorder(), EMAWeights(DECAY)
    fit(build(known=False), run, ema, epochs=1)
    assert ema.ema.num_updates == BATCHES
    if BACKEND == "tensorflow":  # it had none before the first step was done
        run.start, run.steps = run.steps[0], run.steps[1:]
    assert_near(average(ema), expected(run), BATCHES)


@on_one_backend
def test_options_reach_the_average() -> None:
    model = model_of("bfloat16")
    ema = EMAWeights(DECAY, shadow_dtype="float32", update_every=2, on_nonfinite="skip")
    fit(model, ema, epochs=1)
    assert {one.dtype.name for one in trained(model, average(ema)).values()} == {"float32"}
    assert ema.ema.schedule.update_every == 2
    assert ema.ema.num_updates == BATCHES


# -- other callbacks ------------------------------------------------------------------------------


def test_swap_on_epoch_shows_the_average_to_later_callbacks() -> None:
    run = recorded()
    model, ema = model_of(), EMAWeights(DECAY, swap_on_epoch=True)
    before, after, wrote = Seen(), Seen(), []
    at_end = keras.callbacks.LambdaCallback(on_train_end=lambda logs: wrote.append(weights(model)))
    fit(model, before, ema, after, at_end)
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
    with pytest.raises(OSError, match="planted"):
        fit(model, ema, Raising(OSError, "on_epoch_end"))
    assert ema.applied
    assert_near(weights(model), expected(run), BATCHES)
    with pytest.raises(StateError, match="restore"):
        ema.update()
    ema.restore()
    assert_same(weights(model), run.steps[-1])


def checkpoint(path: Path, **options: Any) -> Any:
    return keras.callbacks.ModelCheckpoint(os.fspath(path), save_weights_only=True, **options)


@on_one_backend
@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_what_a_model_checkpoint_saves(tmp_path: Path, swap_on_epoch: bool) -> None:
    run = recorded()
    before, after = (checkpoint(tmp_path / f"{n}-{{epoch}}.weights.h5") for n in ("early", "late"))
    fit(model_of(), before, EMAWeights(DECAY, swap_on_epoch=swap_on_epoch), after)
    for epoch, last in ((1, BATCHES), (2, 2 * BATCHES)):
        assert_same(loaded(tmp_path / f"early-{epoch}.weights.h5"), run.steps[last - 1])
        found = loaded(tmp_path / f"late-{epoch}.weights.h5")
        if swap_on_epoch:
            assert_near(found, expected(run, steps=slice(last)), last)
        else:
            assert_same(found, run.steps[last - 1])


@on_one_backend
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_the_best_epoch_is_that_of_the_average_for_callbacks_that_come_later(
    swap_on_epoch: bool, first: bool, tmp_path: Path
) -> None:
    epochs, other, losses = 4, model_of("other"), []
    run = recorded(epochs=epochs)
    for epoch in range(1, epochs + 1):
        set_weights(other, expected(run, steps=slice(epoch * BATCHES)))
        losses.append(other.evaluate(XV, YV, batch_size=BATCH, verbose=0))
    best = int(np.argmax(losses)) + 1
    assert best < epochs  # for the sake of the test the best is the worst, which is not the last
    model, ema = model_of(), EMAWeights(DECAY, swap_on_epoch=swap_on_epoch)
    path, best_is = tmp_path / "best.weights.h5", {"monitor": "val_loss", "mode": "max"}
    theirs = [
        checkpoint(path, save_best_only=True, **best_is),
        keras.callbacks.EarlyStopping(patience=epochs, restore_best_weights=True, **best_is),
    ]
    history = fit(model, *([*theirs, ema] if first else [ema, *theirs]), epochs=epochs).history
    np.testing.assert_allclose(history["val_loss"], losses, rtol=1e-4)
    for found in (loaded(path), weights(model)):  # early stopping wrote it at the end
        if swap_on_epoch and not first:
            assert_near(found, expected(run, steps=slice(best * BATCHES)), best * BATCHES)
        else:
            assert_same(found, run.steps[best * BATCHES - 1])
    assert_near(average(ema), expected(run), epochs * BATCHES)  # whatever was written elsewhere
    assert not ema.applied


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
        path = tmp_path / folder / "average.safetensors"
        ema = EMAWeights(fastema.rules.warmup(0.9), backup=path, **OPTIONS[dtype])
        backup = keras.callbacks.BackupAndRestore(os.fspath(tmp_path / folder / "model"))
        return ema, [ema, backup] if first else [backup, ema]

    def cut_short(model: Any, *callbacks: Any, after: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            fit(model, *callbacks, Raising(KeyboardInterrupt, "on_train_batch_end", after=after),
                epochs=3)  # fmt: skip

    model = model_of("resumable")
    whole, both = callbacks("whole")
    fit(model, *both, epochs=3)
    want_weights, want = weights(model), average(whole)

    ended, both = callbacks("parts")
    cut_short(model_of("resumable"), *both, after=2 * BATCHES + 2)
    assert ended.ema.num_updates == 2 * BATCHES + 3
    model = model_of("resumable")
    ema, both = callbacks("parts")  # new objects
    cut_short(model, *both, after=4)
    cut_short(model, *both, after=1)  # the same objects
    fit(model, *both, epochs=3)
    assert ema.ema.num_updates == 3 * BATCHES
    assert_same(average(ema), want)
    assert_same(weights(model), want_weights)


def test_a_run_that_ended_between_two_backups(tmp_path: Path) -> None:
    path = tmp_path / "new" / "average.safetensors"
    model, whole = model_of("resumable"), EMAWeights(DECAY)
    fit(model, whole, epochs=3)
    want = average(whole)
    backup = keras.callbacks.BackupAndRestore(os.fspath(tmp_path / "model"))
    # The average is of epoch 2, the model of epoch 1.
    ends = Raising(KeyboardInterrupt, "on_epoch_end", after=1)
    with pytest.raises(KeyboardInterrupt):
        fit(model_of("resumable"), EMAWeights(DECAY, backup=path), ends, backup, epochs=3)
    ema = EMAWeights(DECAY, backup=path)
    backup = keras.callbacks.BackupAndRestore(os.fspath(tmp_path / "model"))
    fit(model_of("resumable"), ema, backup, epochs=3)
    assert_same(average(ema), want)
    names = {one.name for one in path.parent.iterdir()}
    assert names == {"average.safetensors", "average.previous.safetensors"}


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
    path, again = tmp_path / "new" / "average.weights.h5", tmp_path / "again.weights.h5"
    run = recorded()
    model, ema = model_of(), EMAWeights(DECAY, save_path=path)
    fit(model, ema, epochs=1)
    assert_same(weights(model), run.steps[BATCHES - 1])
    assert_same(loaded(path), average(ema))
    kept: Weights = {}

    def midway(batch: int, logs: Any) -> None:
        if batch == 2:
            ema.save_weights(again)
            kept.update(average(ema))

    fit(model, ema, keras.callbacks.LambdaCallback(on_train_batch_end=midway), epochs=1)
    assert_same(loaded(again), kept)
    assert_same(weights(model), run.steps[-1])


@on_one_backend
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "average.weights.h5"
    path.write_bytes(b"old")
    now = fitted()

    def fails(model: Any, name: str) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(type(now.model), "save_weights", fails)
        with pytest.raises(OSError, match="no space left"):
            now.ema.save_weights(path)
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    now.assert_unchanged()
    now.ema.save_weights(path)
    assert_same(loaded(path), now.avg)
    new, plain = tmp_path / "new.weights.h5", tmp_path / "plain.weights.h5"
    now.ema.save_weights(new)
    now.model.save_weights(plain)
    assert new.stat().st_mode == plain.stat().st_mode


@on_one_backend
def test_state_dicts() -> None:
    model, ema, *_ = fitted()
    state = ema.state_dict()
    fit(model, ema, epochs=1)
    want, raw = average(ema), weights(model)

    model = model_of()
    fit(model, epochs=1)
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


def test_whole_models_are_saved_in_fit(tmp_path: Path) -> None:
    model, ema = model_of(), EMAWeights(DECAY, swap_on_epoch=True)
    path = tmp_path / "model.keras"
    fit(model, ema, keras.callbacks.ModelCheckpoint(os.fspath(path)), epochs=1)
    found = keras.models.load_model(path)
    assert_same(weights(found), average(ema))
    other = EMAWeights(DECAY)
    fit(found, other, epochs=1)
    assert other.ema.num_updates == BATCHES


# -- wrong uses -----------------------------------------------------------------------------------


@on_one_backend
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"save_path": "a.h5"}, r"save_path='a\.h5'.*\.weights\.h5"),
        ({"backup": "a.npz"}, r"backup='a\.npz'.*\.safetensors"),
        ({"decay": (0.9, 0.99), "which": None}, "which"),
        ({"decay": (0.9, 0.99), "which": 2}, "which"),
        ({"decay": (0.9, 0.99), "which": -3}, "which"),
        ({"decay": 0.9, "which": 1}, "which"),
    ],
    ids=str,
)
def test_options_that_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        EMAWeights(**options)


@on_one_backend
def test_bad_options_are_refused_before_training() -> None:
    model = model_of()
    before = weights(model)
    for options in ({"decay": 1.5}, {"buffers": "keep"}, {"shadow_dtype": "int8"}):
        with pytest.raises(FastemaError):
            fit(model, EMAWeights(**options))
        assert_same(weights(model), before)


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
def test_a_model_without_an_optimizer() -> None:
    ema = EMAWeights(DECAY)
    ema.set_model(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]))
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
    ema, other = fitted().ema, model_of("other")
    for call in (lambda: fit(other, ema), lambda: other.predict(XV, verbose=0, callbacks=[ema])):
        with pytest.raises(StateError, match="another model"):
            call()
