"""Averages in the checkpoints of the Hugging Face Trainer: saved, resumed, and refused."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

import fastema.transformers
from fastema.checkpoint import files
from fastema.errors import CheckpointError
from fastema.transformers import EMACallback

from ..support.torch_states import assert_near, assert_same, snapshot
from .averaged import prepare_run, train_run, trainer
from .network import (
    DECAY,
    EVERY_FOUR,
    FILE,
    SAVED,
    STEPS,
    TRAINING,
    CallAt,
    Network,
    Recorder,
    average_in,
    average_of,
)
from .runs import MARKS

NEEDS = ("accelerate",)

pytestmark = MARKS

OPTIONS: dict[str, dict[str, Any]] = {
    "warmup": {"decay": fastema.rules.warmup(0.9)},
    "mean": {"decay": fastema.rules.cumulative_mean()},
    "every second, later": {"update_every": 2, "start_after": 3},
    "sixteen bits": {"shadow_dtype": "bfloat16", "seed": 7},
    "sixteen bits and sixteen": {"shadow_dtype": "bf16+16"},
    "debiased": {"zero_debias": True, "shadow_dtype": torch.float64},
    "two": {"decay": (0.5, 0.9), "which": 1, "buffers": "average"},
    "the last of two": {"decay": (0.5, 0.9), "which": -1},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_reaches_the_average_and_resumes_bit_identically(
    tmp_path: Path, option: str
) -> None:
    options = {"decay": DECAY, **OPTIONS[option]}
    run = train_run(tmp_path, EMACallback(**options), **EVERY_FOUR, **SAVED)
    again = train_run(
        tmp_path / "rest", EMACallback(**options), resume=tmp_path / "checkpoint-8", **EVERY_FOUR
    )
    assert_same(snapshot(again.model), snapshot(run.model))
    assert_same(again.model.evaluated[-1], run.model.evaluated[-1])
    assert again.ema.ema.num_updates == STEPS

    which = options.pop("which", None)
    expected = fastema.EMA(begun := Network(), **options)
    recorder = Recorder()
    trainer(tmp_path / "plain", recorder).train()
    for step in recorder.steps:
        begun.load_state_dict(step)
        expected.update()
    with expected.swapped(which=which):
        assert_same(snapshot(run.model), snapshot(begun))


@pytest.mark.parametrize("held", [None, "raw"])
def test_checkpoints_hold_weights_and_average_in_separate_files(tmp_path: Path, held: Any) -> None:
    ema = EMACallback(DECAY, checkpoints=held)
    with nullcontext() if held is None else pytest.warns(UserWarning, match="checkpoints='raw'"):
        recorder = train_run(tmp_path, ema, save_total_limit=2, **SAVED).recorder
    assert sorted(one.name for one in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-8"]
    for step in (8, 12):
        folder = tmp_path / f"checkpoint-{step}"
        model, raw = load_file(folder / "model.safetensors"), recorder.steps[step - 1]
        assert_near(average_in(folder), recorder.average(step))
        assert_same(model, average_in(folder) if held is None else raw)
        if held is None:
            assert_same(load_file(folder / TRAINING), raw)
        assert (folder / TRAINING).exists() == (held is None)
        assert not [one for one in folder.iterdir() if one.name.startswith(".")]


@pytest.mark.parametrize("how", ["a path", "the last", "elsewhere", "by name", "added"])
def test_interrupted_run_resumes_bit_identically(tmp_path: Path, how: str) -> None:
    def stop(state: Any, control: Any) -> None:
        control.should_training_stop = state.global_step == 8

    whole, folder = train_run(tmp_path / "whole", **EVERY_FOUR), tmp_path / "run"
    # Another callback sees the checkpoint before the average is written.
    train_run(folder, first=[CallAt("on_save", stop)], **SAVED)
    saved: Any = str(folder / "checkpoint-8")
    if how == "elsewhere":
        saved = shutil.move(saved, tmp_path / "moved")
    model, rest, ema = Network(), Recorder(), EMACallback(DECAY)
    run = trainer(folder, rest, model=model, **EVERY_FOUR, **SAVED)
    if how == "added":
        run.add_callback(ema)
    ema.attach(run)
    if how == "by name":
        run.train(resume_from_checkpoint=saved)
    else:
        run.train(True if how == "the last" else saved)
    assert len(rest.steps) == 4
    assert_same(rest.steps[-1], whole.recorder.steps[-1])
    assert_same(snapshot(model), snapshot(whole.model))
    assert_same(model.evaluated[-1], whole.model.evaluated[-1])
    assert ema.ema.num_updates == STEPS


def lose_average(folder: Path) -> None:
    (folder / FILE).unlink()


def take_average_of_step_4(folder: Path) -> None:
    shutil.copy(folder.parent / "checkpoint-4" / FILE, folder / FILE)


def lose_training_weights(folder: Path) -> None:
    (folder / TRAINING).unlink()


def damage_average(folder: Path) -> None:
    whole = bytearray((folder / FILE).read_bytes())
    stored = files.read(folder / FILE).tensors["shadow.0.second.weight"]
    whole[stored.offset + 5] ^= 64
    (folder / FILE).write_bytes(whole)


def change_one_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    held = load_file(path)
    held["second.bias"] += 1
    save_file(held, path, metadata={"format": "pt"})


def run_without_average(folder: Path) -> None:
    """Train without an average into the folders of a run that had one."""
    old = (folder / FILE).read_bytes()
    trainer(folder.parent, **SAVED, learning_rate=0.3).train()
    assert (folder / FILE).read_bytes() == old


OTHER_WEIGHTS = r"of other weights.*model.safetensors.*delete ema.safetensors and"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (lose_average, [{}], r"checkpoint-8 has no ema.safetensors.*'begin'"),
        (take_average_of_step_4, [{}], "average of step 4, and training resumes at step 8"),
        (lambda folder: None, [{"shadow_dtype": "bfloat16"}], r"first.weight.*f32, expected bf16"),
        (damage_average, [{}], r"damaged: 'shadow\.0\.second\.weight' differs"),
        (change_one_weight, [{}], OTHER_WEIGHTS),
        (lose_training_weights, [{}], "of other weights.*training_weights.safetensors"),
        (run_without_average, [{}, {"on_missing": "begin"}], OTHER_WEIGHTS),
    ],
)
def test_checkpoint_with_a_mismatched_average_is_refused(
    tmp_path: Path, changes: Callable[[Path], object], options: list[Any], message: str
) -> None:
    train_run(tmp_path, **SAVED)
    changes(tmp_path / "checkpoint-8")
    for given in options:
        with pytest.raises(CheckpointError, match=message):
            train_run(
                tmp_path / "rest", EMACallback(DECAY, **given), resume=tmp_path / "checkpoint-8"
            )


def test_training_weights_beside_the_model_of_another_run_are_refused(tmp_path: Path) -> None:
    train_run(tmp_path, **SAVED)
    saved = tmp_path / "checkpoint-8"
    run_without_average(saved)
    lose_average(saved)
    begins = EMACallback(DECAY, on_missing="begin")
    with pytest.raises(CheckpointError, match=r"training_weights\.safetensors is of other weights"):
        train_run(tmp_path / "rest", begins, resume=saved)
    lose_training_weights(saved)
    run = train_run(tmp_path / "rest", begins, resume=saved)
    begun = load_file(saved / "model.safetensors")
    assert_near(snapshot(run.model), average_of(begun, run.recorder.steps))


@pytest.mark.parametrize("at_end", ["average", "raw"])
@pytest.mark.parametrize("limit", [None, 1])
def test_best_model_is_chosen_by_its_average(
    tmp_path: Path, at_end: Any, limit: int | None
) -> None:
    # With large steps the highest loss, "best" here, is somewhere in the middle.
    run, model, recorder, ema = train_run(
        tmp_path, EMACallback(0.5, at_end=at_end), load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True, save_total_limit=limit,
        learning_rate=1.0, lr_scheduler_type="constant", eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = int(np.argmax(losses))
    assert 0 < best < len(losses) - 1
    assert run.state.best_global_step == best + 1
    assert run.state.best_metric == losses[best]
    raw, average = recorder.steps[best], model.evaluated[best]
    assert_same(snapshot(model), average if at_end == "average" else raw)
    assert run.evaluate()["eval_loss"] == losses[best]
    assert ema.ema.num_updates == best + 1


@pytest.mark.parametrize("spoil", [lose_average, change_one_weight])
def test_best_model_whose_average_does_not_fit_keeps_its_own_weights(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    spoils = CallAt("on_save", lambda state, _: spoil(tmp_path / f"checkpoint-{state.global_step}"))
    run = prepare_run(tmp_path, first=[spoils], load_best_model_at_end=True, **EVERY_FOUR, **SAVED)
    with pytest.warns(UserWarning, match=r"has (no|the wrong) ema\.safetensors.*the average in"):
        run.trainer.train()
    saved = load_file(f"{run.trainer.state.best_model_checkpoint}/model.safetensors")
    run.trainer.evaluate()
    assert_same(snapshot(run.model), saved)
    assert_same(run.model.evaluated[-1], saved)


def test_resumed_average_keeps_its_schedule_or_begins_where_asked_to(tmp_path: Path) -> None:
    whole, saved = train_run(tmp_path, **SAVED), tmp_path / "checkpoint-8"
    with pytest.warns(UserWarning, match=r"with its saved schedule,.*0\.8.*not with.*0\.9"):
        run = train_run(tmp_path / "rest", EMACallback(0.9), resume=saved)
    assert_same(snapshot(run.model), snapshot(whole.model))
    lose_average(saved)
    run = train_run(tmp_path / "rest", EMACallback(DECAY, on_missing="begin"), resume=saved)
    begun = load_file(saved / TRAINING)
    assert_near(snapshot(run.model), average_of(begun, run.recorder.steps))


def test_average_is_saved_by_other_callbacks_and_by_trainers_with_their_own_checkpoints(
    tmp_path: Path,
) -> None:
    class Saving(Trainer):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            if self.state.global_step == 5:
                Path(tmp_path, "checkpoint-5").mkdir()

    def ask(state: Any, control: Any) -> None:
        if state.global_step in (5, 6):
            run.trainer._save_checkpoint(run.model, trial=None)

    run = prepare_run(tmp_path, first=[CallAt("on_step_end", ask)], kind=Saving)
    with (
        pytest.warns(UserWarning, match=r"checkpoint-5 without save_model\(\).*training weights"),
        pytest.raises(CheckpointError, match=r"not in .*checkpoint-6.*_get_output_dir"),
    ):
        run.trainer.train()
    assert len(run.recorder.steps) == run.ema.ema.num_updates - 1 == 5
    assert_near(average_in(tmp_path / "checkpoint-5"), run.recorder.average())


def test_trainer_without_its_callback_saves_checkpoints_without_an_average(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, **SAVED)
    run.trainer.remove_callback(run.ema)
    run.trainer.train()
    for step in (4, 8, 12):
        folder = tmp_path / f"checkpoint-{step}"
        assert_same(load_file(folder / "model.safetensors"), run.recorder.steps[step - 1])
        assert not (folder / FILE).exists()
