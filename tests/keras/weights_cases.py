"""Tests of fastema.keras on the backend that KERAS_BACKEND names; see test_backends.py."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import fastema
from fastema.errors import ArgumentError
from fastema.keras import EMAWeights

from .backends import on_one_backend
from .data import BATCH, BATCHES, DECAY, MARKS, XV, YV, fit
from .models import Weights, assert_near, assert_same, model_of, read_weights, set_weights, weights
from .runs import ErrorAt, HookRecorder, StepRecorder, average, expected_average, record_run

pytestmark = MARKS


RULES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "default": ({}, lambda n: 0.999),
    "constant": ({"decay": DECAY}, lambda n: DECAY),
    "warmup": ({"decay": fastema.rules.warmup(DECAY)}, lambda n: min(DECAY, (1 + n) / (10 + n))),
}


@pytest.mark.parametrize("rule", RULES)
def test_average_equals_the_recursion_over_all_steps(rule: str) -> None:
    run = record_run()
    options, decay = RULES[rule]
    model, ema = model_of(), EMAWeights(**options)
    fit(model, ema)
    assert ema.ema.num_updates == len(run.steps) == 2 * BATCHES
    assert rule != "default" or ema.ema.decay == 0.999
    assert_near(average(ema), expected_average(run, decay), len(run.steps))
    ema.restore()
    assert_same(weights(model), run.steps[-1])  # training is unaffected


@pytest.mark.parametrize("how", ["in two fits", "before one that syncs", "after one that syncs"])
def test_average_continues_in_a_second_fit_and_beside_a_jax_sync(how: str) -> None:
    run = record_run()
    model, ema = model_of(), EMAWeights(DECAY)
    if how == "in two fits":
        fit(model, ema, epochs=1)
        fit(model, ema, epochs=1)
    else:
        fit(model, *([ema, StepRecorder()] if "before" in how else [StepRecorder(), ema]))
    assert ema.ema.num_updates == 2 * BATCHES
    assert_near(average(ema), expected_average(run), len(run.steps))
    ema.restore()
    assert_same(weights(model), run.steps[-1])


@pytest.mark.parametrize("kind", ["accumulating", "scaled"])
def test_batches_without_an_optimizer_step_are_not_counted(kind: str) -> None:
    run = record_run(kind)
    steps = len(run.steps)
    assert (steps == 3) if kind == "accumulating" else (0 < steps < run.batches)
    assert run.batches == 12
    model, ema = model_of(kind), EMAWeights(DECAY)
    fit(model, ema)
    assert ema.ema.num_updates == steps
    assert kind != "scaled" or steps == int(model.optimizer.iterations)
    assert_near(average(ema), expected_average(run), steps)


@pytest.mark.parametrize("checkpoints", [None, "raw"])
def test_later_callbacks_and_the_end_of_fit_see_the_average_unless_raw(checkpoints: Any) -> None:
    run = record_run()
    model, ema = model_of(), EMAWeights(DECAY, checkpoints=checkpoints)
    before, after, wrote = HookRecorder(), HookRecorder(), []
    at_end = keras.callbacks.LambdaCallback(on_train_end=lambda logs: wrote.append(weights(model)))
    fit(model, before, ema, after, at_end)
    for epoch, last in enumerate([BATCHES, 2 * BATCHES]):
        assert_same(before.at["epoch_end"][epoch], run.steps[last - 1])
        if checkpoints == "raw":
            assert_same(after.at["epoch_end"][epoch], run.steps[last - 1])
        else:
            assert_near(
                after.at["epoch_end"][epoch], expected_average(run, steps=slice(last)), last
            )
    assert_same(after.at["epoch_begin"][1], run.steps[BATCHES - 1])
    held = run.steps[-1] if checkpoints == "raw" else average(ema)
    assert_same(wrote[0], held)
    assert_same(weights(model), held)
    assert ema.applied == (checkpoints is None)
    ema.restore()
    assert_same(weights(model), run.steps[-1])


def checkpoint(path: Path, **options: Any) -> Any:
    return keras.callbacks.ModelCheckpoint(os.fspath(path), save_weights_only=True, **options)


@on_one_backend
@pytest.mark.parametrize(("checkpoints", "first"), [(None, False), ("raw", False), ("raw", True)])
def test_callbacks_keep_the_best_epoch_that_the_average_has_chosen(
    checkpoints: Any, first: bool, tmp_path: Path
) -> None:
    epochs, other, losses = 4, model_of("other"), []
    run = record_run(epochs=epochs)
    for epoch in range(1, epochs + 1):
        set_weights(other, expected_average(run, steps=slice(epoch * BATCHES)))
        losses.append(other.evaluate(XV, YV, batch_size=BATCH, verbose=0))
    best = int(np.argmax(losses)) + 1
    assert best < epochs  # "best" is the highest loss, so it is not the last epoch
    model, ema = model_of(), EMAWeights(DECAY, checkpoints=checkpoints)
    path, best_is = tmp_path / "best.weights.h5", {"monitor": "val_loss", "mode": "max"}
    theirs = [
        checkpoint(path, save_best_only=True, **best_is),
        keras.callbacks.EarlyStopping(patience=epochs, restore_best_weights=True, **best_is),
    ]
    told = pytest.warns(UserWarning, match="EarlyStopping and ModelCheckpoint keep the training")
    with nullcontext() if checkpoints is None else told:
        callbacks = [*theirs, ema] if first else [ema, *theirs]
        history = fit(model, *callbacks, epochs=epochs).history
    np.testing.assert_allclose(history["val_loss"], losses, rtol=1e-4)
    for found in (read_weights(path), weights(model)):  # early stopping restores the best weights
        if checkpoints is None:
            assert_near(found, expected_average(run, steps=slice(best * BATCHES)), best * BATCHES)
        else:
            assert_same(found, run.steps[best * BATCHES - 1])
    assert_near(average(ema), expected_average(run), epochs * BATCHES)


@on_one_backend
def test_callbacks_that_would_keep_other_weights_than_validated_are_refused(tmp_path: Path) -> None:
    ema, saving = EMAWeights(DECAY), checkpoint(tmp_path / "best.weights.h5")
    stopping = keras.callbacks.EarlyStopping(restore_best_weights=True)
    within = checkpoint(tmp_path / "step.weights.h5", save_freq=2)
    backup = keras.callbacks.BackupAndRestore(os.fspath(tmp_path / "model"))
    for callbacks, words in (
        ([saving, ema], "ModelCheckpoint comes before EMAWeights.*put EMAWeights before"),
        ([stopping, ema], "EarlyStopping comes before EMAWeights"),
        ([ema, within], r"ModelCheckpoint\(save_freq=2\) saves within epochs"),
        ([ema, backup], "BackupAndRestore comes after EMAWeights.*resume from the average"),
    ):
        model = model_of()
        steps = StepRecorder()
        with pytest.raises(ArgumentError, match=words):
            fit(model, *callbacks, steps)
        assert len(steps.steps) == BATCHES  # before anything is kept by a validation
        assert_same(weights(model), steps.steps[-1])


OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"shadow_dtype": "bfloat16", "seed": 7},
    "bf16+16": {"shadow_dtype": "bf16+16"},
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", OPTIONS)
def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    tmp_path: Path, dtype: str, first: bool
) -> None:
    def callbacks(folder: str) -> tuple[EMAWeights, list[Any]]:
        path = tmp_path / folder / "average.safetensors"
        ema = EMAWeights(
            fastema.rules.warmup(0.9),
            backup=path,
            checkpoints="raw" if first else "average",
            **OPTIONS[dtype],
        )
        backup = keras.callbacks.BackupAndRestore(os.fspath(tmp_path / folder / "model"))
        return ema, [ema, backup] if first else [backup, ema]

    def cut_short(model: Any, *callbacks: Any, after: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            fit(model, *callbacks, ErrorAt(KeyboardInterrupt, "on_train_batch_end", after=after),
                epochs=3)  # fmt: skip

    model = model_of("resumable")
    whole, both = callbacks("whole")
    fit(model, *both, epochs=3)
    whole.restore()
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
    ema.restore()
    assert_same(weights(model), want_weights)


def test_saved_weights_are_the_average(tmp_path: Path) -> None:
    path, again = tmp_path / "new" / "average.weights.h5", tmp_path / "again.weights.h5"
    run = record_run()
    model, ema = model_of(), EMAWeights(DECAY, save_path=path)
    fit(model, ema, epochs=1)
    assert_same(weights(model), average(ema))
    assert_same(read_weights(path), average(ema))
    model.save_weights(again)
    assert_same(read_weights(again), average(ema))
    kept: Weights = {}

    def midway(batch: int, logs: Any) -> None:
        if batch == 2:
            ema.save_weights(again)
            kept.update(average(ema))

    fit(model, ema, keras.callbacks.LambdaCallback(on_train_batch_end=midway), epochs=1)
    assert_same(read_weights(again), kept)
    ema.restore()
    assert_same(weights(model), run.steps[-1])


@on_one_backend
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"save_path": "a.h5"}, r"save_path='a\.h5'.*\.weights\.h5"),
        ({"checkpoints": "best"}, "checkpoints='best': expected one of average, raw"),
        ({"backup": "a.npz"}, r"backup='a\.npz'.*\.safetensors"),
        ({"decay": (0.9, 0.99), "which": None}, "which"),
        ({"decay": (0.9, 0.99), "which": 2}, "which"),
        ({"decay": (0.9, 0.99), "which": -3}, "which"),
        ({"decay": 0.9, "which": 1}, "which"),
    ],
    ids=str,
)
def test_invalid_options_are_refused_at_construction(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        EMAWeights(**options)
