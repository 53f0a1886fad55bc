"""Real runs of the Hugging Face Trainer with a moving average of its weights."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainerState,
)

import fastema.transformers
from fastema.checkpoint import files, load_state
from fastema.errors import ArgumentError, CheckpointError, StateError
from fastema.transformers import EMACallback

from .runs import MARKS, data, quiet_trainer

NEEDS = ("accelerate",)


pytestmark = MARKS

DECAY, STEPS = 0.8, 12  # two epochs of six
FILE = "ema.safetensors"

State = dict[str, torch.Tensor]


class Network(torch.nn.Module):
    """Notes its weights in each evaluation, by the step of the run that it is in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.second = torch.nn.Linear(4, 1)
        self.evaluated: list[State] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.training:
            self.evaluated.append(snapshot(self))
        found = self.second(torch.tanh(self.norm(self.first(x.to(self.first.weight.dtype)))))
        return {"loss": (found - labels).square().mean(), "logits": found}


def snapshot(module: torch.nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Noting(TrainerCallback):
    """Keeps the weights as they are at events."""

    def __init__(self) -> None:
        self.steps: list[State] = []
        self.seen: list[tuple[str, State]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(snapshot(kwargs["model"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(("evaluate", snapshot(kwargs["model"])))

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(("predict", snapshot(kwargs["model"])))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(("step", snapshot(kwargs["model"])))


def trainer(
    folder: Path, *callbacks: Any, model: torch.nn.Module | None = None, **options: Any
) -> Trainer:
    names = ("model_init", "optimizers", "train_dataset", "eval_dataset")
    given = {name: options.pop(name) for name in names if name in options}
    if "model_init" not in given:
        given["model"] = model or Network()
    settings = {"num_train_epochs": 2, "per_device_eval_batch_size": 8, "logging_steps": 100}
    return quiet_trainer(folder, *callbacks, given=given, **{**settings, **options})


def average_in(folder: Path) -> State:
    """The averaged tensors beside a checkpoint, by the names that the model has."""
    found = load_file(folder / FILE)
    return {
        name.removeprefix("shadow.0."): value for name, value in found.items() if name != "state"
    }


def assert_same(found: State, want: State) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def assert_near(found: State, want: State) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=2e-6, atol=2e-7, msg=name
        )


def differ(one: State, other: State) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


def average_of(begun: State, steps: list[State], decay: float = DECAY) -> State:
    """In float64; buffers are those of the last step."""
    found = {name: value.double() for name, value in begun.items()}
    for step in steps:
        for name, value in step.items():
            if "running" in name or "num_batches" in name:
                found[name] = value
            else:
                found[name] = decay * found[name] + (1 - decay) * value.double()
    return found


EVERY_FOUR: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}


@pytest.mark.parametrize("at_end", ["average", "raw"])
def test_each_evaluation_and_the_end_have_the_average_of_the_definition(
    tmp_path: Path, at_end: Any
) -> None:
    model, noting, ema = Network(), Noting(), EMACallback(DECAY, at_end=at_end)
    begun = snapshot(model)
    run = trainer(tmp_path, noting, ema, model=model, eval_on_start=True, **EVERY_FOUR)
    run.train()
    assert len(noting.steps) == ema.ema.num_updates == STEPS
    assert_same(model.evaluated[0], begun)
    for evaluated, step in zip(model.evaluated[1:], (4, 8, 12), strict=True):
        assert_near(evaluated, average_of(begun, noting.steps[:step]))
    # Events after an evaluation see the weights, those within it the average.
    steps = iter([begun, *noting.steps[3::4]])
    within = iter(model.evaluated)
    for event, seen in noting.seen:
        assert_same(seen, next(within if event == "step" else steps))
    average = model.evaluated[-1]
    assert_same(snapshot(model), average if at_end == "average" else noting.steps[-1])

    plain, other = Network(), Noting()
    trainer(tmp_path, other, model=plain).train()
    for one, same in zip(noting.steps, other.steps, strict=True):
        assert_same(one, same)  # evaluations and the average change nothing
    # After training, too.
    metrics = run.evaluate()
    assert metrics["eval_loss"] == run.state.log_history[-1]["eval_loss"]
    run.predict(data(8))
    assert_same(model.evaluated[-2], average)
    assert_same(model.evaluated[-1], average)
    with ema.swapped():
        assert_same(snapshot(model), average)
    run.save_model()
    assert_same(
        load_file(tmp_path / "model.safetensors"),
        average if at_end == "average" else noting.steps[-1],
    )
    ema.save_model(str(tmp_path / "average"))
    assert_same(load_file(tmp_path / "average" / "model.safetensors"), average)


@pytest.mark.parametrize("how", ["given", "a class", "added", "attached", "twice"])
def test_ways_to_join_a_trainer(tmp_path: Path, how: str) -> None:
    ema = EMACallback(at_end="raw")
    given = {"given": [ema], "a class": [EMACallback], "twice": [ema]}.get(how, [])
    run = trainer(tmp_path, *given, **EVERY_FOUR)
    begun = snapshot(run.model)
    if how == "added":
        run.add_callback(ema)
    elif how in ("attached", "twice"):
        assert ema.attach(run) is ema
    run.evaluate()  # there is no average yet
    run.train()
    found = [one for one in run.callback_handler.callbacks if isinstance(one, EMACallback)]
    assert len(found) == 1
    model: Any = run.model
    assert_same(model.evaluated[0], begun)
    assert differ(model.evaluated[-1], snapshot(model)) is (how != "a class")
    with found[0].swapped():
        assert_same(snapshot(model), model.evaluated[-1])
    # Taken away again it does nothing.
    raw = {name: value + 1 for name, value in snapshot(model).items()}
    model.load_state_dict(raw)
    run.remove_callback(found[0])
    run.evaluate()
    assert_same(model.evaluated[-1], raw)


def test_a_callback_may_move_to_another_trainer(tmp_path: Path) -> None:
    ema = EMACallback(DECAY, at_end="raw")
    first = trainer(tmp_path, ema, **EVERY_FOUR)
    first.train()
    model, noting = Network(), Noting()
    begun = snapshot(model)
    second = trainer(tmp_path, noting, ema, model=model, **EVERY_FOUR)
    second.train()
    assert_near(model.evaluated[-1], average_of(begun, noting.steps))
    other: Any = first.model
    raw = snapshot(other)
    first.evaluate()
    assert_same(other.evaluated[-1], raw)
    # And back.
    trainer(tmp_path / "saved", EMACallback(DECAY), **SAVED).train()
    first.train(str(tmp_path / "saved" / "checkpoint-8"))
    assert ema.ema.num_updates == STEPS
    first.evaluate()
    with ema.swapped():
        assert_same(snapshot(other), other.evaluated[-1])


def test_another_training_begins_another_average(tmp_path: Path) -> None:
    model, noting = Network(), Noting()
    run = trainer(tmp_path, noting, EMACallback(DECAY), model=model, **EVERY_FOUR)
    run.train()
    begun = snapshot(model)
    assert_near(begun, average_of(snapshot(Network()), noting.steps))
    run.train()
    assert_near(snapshot(model), average_of(begun, noting.steps[STEPS:]))
    assert_near(model.evaluated[-2], average_of(begun, noting.steps[STEPS : STEPS + 8]))


def test_what_is_loaded_after_training_is_evaluated(tmp_path: Path) -> None:
    model = Network()
    run = trainer(tmp_path, EMACallback(DECAY), model=model)
    run.train()
    model.load_state_dict(begun := snapshot(Network()))
    run.evaluate()
    assert_same(model.evaluated[-1], begun)


def test_gradient_accumulation_counts_steps_of_the_optimizer(tmp_path: Path) -> None:
    model, noting, ema = Network(), Noting(), EMACallback(DECAY)
    begun = snapshot(model)
    run = trainer(
        tmp_path, noting, ema, model=model, gradient_accumulation_steps=4, num_train_epochs=3
    )
    run.train()
    assert ema.ema.num_updates == len(noting.steps) == run.state.global_step == 6
    assert_near(snapshot(model), average_of(begun, noting.steps))


class Skipping(TrainerCallback):
    """An optimizer that leaves out some steps, as the scaler of float16 does."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        skip = state.global_step in (2, 3)
        optimizer._is_overflow = skip
        if skip:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad.zero_()


def test_steps_that_a_scaler_skips_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    monkeypatch.setattr(
        AcceleratedOptimizer,
        "step_was_skipped",
        property(lambda self: getattr(self, "_is_overflow", False)),
    )
    noting, ema = Noting(), EMACallback(DECAY)
    model = Network()
    begun = snapshot(model)
    trainer(tmp_path, Skipping(), noting, ema, model=model).train()
    assert ema.ema.num_updates == STEPS - 2
    counted = [step for k, step in enumerate(noting.steps) if k not in (2, 3)]
    found, want = snapshot(model), average_of(begun, counted)
    assert_near(found, want)


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
def test_all_options_of_an_average_are_passed_on_and_resumed_to_the_bit(
    tmp_path: Path, option: str
) -> None:
    options = {"decay": DECAY, **OPTIONS[option]}
    model, ema = Network(), EMACallback(**options)
    run = trainer(tmp_path, ema, model=model, **EVERY_FOUR, **SAVED)

    which = options.pop("which", None)
    expected = fastema.EMA(begun := Network(), **options)
    noting = Noting()
    trainer(tmp_path / "plain", noting).train()
    for step in noting.steps:
        begun.load_state_dict(step)
        expected.update()
    run.train()
    with expected.swapped(which=which):
        assert_same(snapshot(model), snapshot(begun))

    again, other = Network(), EMACallback(**OPTIONS[option] | {"decay": options["decay"]})
    rest = trainer(tmp_path / "rest", other, model=again, **EVERY_FOUR)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_same(snapshot(again), snapshot(model))
    assert_same(again.evaluated[-1], model.evaluated[-1])
    assert other.ema.num_updates == STEPS


# -- checkpoints ----------------------------------------------------------------------------------


def test_checkpoints_hold_the_weights_and_the_average_in_files_of_their_own(
    tmp_path: Path,
) -> None:
    noting, ema = Noting(), EMACallback(DECAY)
    run = trainer(tmp_path, noting, ema, save_total_limit=2, **SAVED)
    begun = snapshot(run.model)
    run.train()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-8"]
    for step in (8, 12):
        folder = tmp_path / f"checkpoint-{step}"
        assert_same(load_file(folder / "model.safetensors"), noting.steps[step - 1])
        assert_near(average_in(folder), average_of(begun, noting.steps[:step]))
        assert not [one for one in folder.iterdir() if one.name.startswith(".")]


@pytest.mark.parametrize("how", ["a path", "the last", "elsewhere", "by name", "added"])
def test_an_interrupted_run_goes_on_to_the_bit(tmp_path: Path, how: str) -> None:
    whole, noting = Network(), Noting()
    trainer(tmp_path / "whole", noting, EMACallback(DECAY), model=whole, **EVERY_FOUR).train()

    class Stopping(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 8

    folder = tmp_path / "run"
    # The average is written before or after others see the checkpoint.
    trainer(folder, Stopping(), EMACallback(DECAY), **SAVED).train()
    saved: Any = str(folder / "checkpoint-8")
    if how == "elsewhere":
        saved = shutil.move(saved, tmp_path / "moved")
    model, rest, ema = Network(), Noting(), EMACallback(DECAY)
    run = trainer(folder, rest, model=model, **EVERY_FOUR, **SAVED)
    if how == "added":
        run.add_callback(ema)
    else:
        ema.attach(run)
    if how == "by name":
        run.train(resume_from_checkpoint=saved)
    else:
        run.train(True if how == "the last" else saved)
    assert len(rest.steps) == 4
    assert_same(rest.steps[-1], noting.steps[-1])
    assert_same(snapshot(model), snapshot(whole))
    assert_same(model.evaluated[-1], whole.evaluated[-1])
    assert ema.ema.num_updates == STEPS


def lose_average(folder: Path) -> None:
    (folder / FILE).unlink()


def take_average_of_step_4(folder: Path) -> None:
    shutil.copy(folder.parent / "checkpoint-4" / FILE, folder / FILE)


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
    """Train into the folders of a run that had an average."""
    old = (folder / FILE).read_bytes()
    trainer(folder.parent, **SAVED, learning_rate=0.3).train()
    assert (folder / FILE).read_bytes() == old


OTHER_WEIGHTS = r"average of other weights.*model.safetensors"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (lose_average, [{}], r"checkpoint-8 has no ema.safetensors.*'begin'"),
        (take_average_of_step_4, [{}], "average of step 4, and training resumes at step 8"),
        (lambda folder: None, [{"shadow_dtype": "bfloat16"}], r"first.weight.*f32, expected bf16"),
        (damage_average, [{}], r"damaged: 'shadow\.0\.second\.weight' is"),
        (change_one_weight, [{}], OTHER_WEIGHTS),
        (run_without_average, [{}, {"on_missing": "begin"}], OTHER_WEIGHTS),
    ],
)
def test_a_checkpoint_with_an_average_that_does_not_fit_is_refused(
    tmp_path: Path, changes: Callable[[Path], object], options: list[Any], message: str
) -> None:
    trainer(tmp_path, EMACallback(DECAY), **SAVED).train()
    changes(tmp_path / "checkpoint-8")
    for given in options:
        run = trainer(tmp_path / "rest", EMACallback(DECAY, **given))
        with pytest.raises(CheckpointError, match=message):
            run.train(str(tmp_path / "checkpoint-8"))


def test_an_average_begins_at_a_checkpoint_without_one_where_asked_to(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVED).train()
    model, noting = Network(), Noting()
    run = trainer(tmp_path / "b", noting, EMACallback(DECAY, on_missing="begin"), model=model)
    run.train(str(tmp_path / "checkpoint-8"))
    begun = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert_near(snapshot(model), average_of(begun, noting.steps))


def test_files_without_weights_are_not_other_weights(tmp_path: Path) -> None:
    trainer(tmp_path, EMACallback(DECAY), **SAVED).train()
    (tmp_path / "checkpoint-8" / "notes.safetensors").write_bytes(b"")
    trainer(tmp_path / "rest", EMACallback(DECAY)).train(str(tmp_path / "checkpoint-8"))


def test_a_resumed_run_that_does_not_say_from_where_is_refused(tmp_path: Path) -> None:
    ema = EMACallback(DECAY, evaluate_with_average=False)
    run = trainer(tmp_path)
    run.state.global_step = 8
    with pytest.raises(StateError, match=r"resumes at step 8.*resume_from_checkpoint"):
        ema.on_train_begin(run.args, run.state, run.control, model=run.model)


class Elsewhere(Trainer):
    """An output folder of its own."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(str(self.args.output_dir)) / "deeper")


def test_the_average_is_where_the_trainer_saves(tmp_path: Path) -> None:
    whole = Network()
    trainer(tmp_path, EMACallback(DECAY), model=whole, kind=Elsewhere, **SAVED).train()
    folder = tmp_path / "deeper" / "checkpoint-8"
    assert (folder / FILE).exists()
    model = Network()
    trainer(tmp_path / "rest", EMACallback(DECAY), model=model).train(str(folder))
    assert_same(snapshot(model), snapshot(whole))


def test_a_trainer_with_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    class Saving(Trainer):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            self.save_model(str(tmp_path / "mine"))

    class Silent(Trainer):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            pass

    trainer(tmp_path, EMACallback(DECAY), kind=Saving, **SAVED).train()
    assert (tmp_path / "mine" / FILE).exists()
    run = trainer(tmp_path, EMACallback(DECAY), kind=Silent, **SAVED)
    with pytest.raises(CheckpointError, match=r"not in .*checkpoint-4.*_get_output_dir"):
        run.train()
    assert "save_model" not in vars(run)


@pytest.mark.parametrize("how", ["load_state", "load_file"])
def test_the_file_beside_a_checkpoint_is_loaded_into_an_average_of_ones_own(
    tmp_path: Path, how: str
) -> None:
    callback = EMACallback(DECAY)
    trainer(tmp_path, callback, **SAVED).train()
    ema = fastema.EMA(Network(), DECAY)
    path = tmp_path / f"checkpoint-{STEPS}" / FILE
    ema.load_state_dict(load_state(path, ema.shadow) if how == "load_state" else load_file(path))
    assert ema.num_updates == STEPS
    assert_same(dict(ema.shadow), dict(callback.ema.shadow))


@pytest.mark.parametrize("name", ["write_state", "state_dict"])
def test_an_old_average_is_gone_before_the_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trainer(tmp_path, EMACallback(DECAY), **SAVED).train()
    folder = tmp_path / "checkpoint-4"
    (folder / f".{FILE}.0123.part").write_bytes(b"of a run that was killed")

    def killed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    holder: Any = fastema.transformers.weights if name == "write_state" else fastema.EMA
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, killed)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, EMACallback(DECAY), **SAVED, learning_rate=0.3).train()
    assert not [one for one in folder.iterdir() if FILE in one.name]
    assert (folder / "model.safetensors").exists()


def test_the_average_is_there_before_older_checkpoints_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Pushing(Trainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            seen.append((Path(output_dir).name, sorted(one.parent.name for one in found())))

    def found() -> list[Path]:
        return list(tmp_path.glob(f"checkpoint-*/{FILE}"))

    trainer(tmp_path, EMACallback(DECAY), kind=Pushing, **SAVED, save_total_limit=1).train()
    assert seen == [
        ("checkpoint-4", ["checkpoint-4"]),
        ("checkpoint-8", ["checkpoint-4", "checkpoint-8"]),
        ("checkpoint-12", ["checkpoint-12", "checkpoint-8"]),
    ]
    assert [one.parent.name for one in found()] == ["checkpoint-12"]


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_a_checkpoint_that_another_callback_asks_for(tmp_path: Path, event: str) -> None:
    """As ``JITCheckpointCallback`` does on SIGTERM, before this callback's turn."""
    whole, noting = Network(), Noting()
    begun = snapshot(whole)

    class Asking(TrainerCallback):
        def __init__(self) -> None:
            setattr(self, event, self._ask)

        def _ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                run._save_checkpoint(run.model, trial=None)

    run = trainer(tmp_path, Asking(), noting, EMACallback(DECAY), model=whole)
    run.train()
    assert_near(average_in(tmp_path / "checkpoint-5"), average_of(begun, noting.steps[:5]))
    assert_near(snapshot(whole), average_of(begun, noting.steps))
    model = Network()
    trainer(tmp_path / "rest", EMACallback(DECAY), model=model).train(
        str(tmp_path / "checkpoint-5")
    )
    # Of the batch before its step, that is taken again, the Trainer saves the buffers.
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_checkpoint_of_the_average_as_weights_is_refused(tmp_path: Path) -> None:
    def metrics(found: Any) -> dict[str, float]:
        run._save_checkpoint(run.model, trial=None)
        return {}

    run = trainer(tmp_path, EMACallback(DECAY), **EVERY_FOUR)
    run.compute_metrics = metrics
    with pytest.raises(StateError, match="about to save a checkpoint while the average"):
        run.train()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"decay": 0.9}, {"decay": DECAY, "update_every": 2}, {"decay": DECAY}]
)
def test_a_resumed_average_keeps_its_schedule_and_says_so(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = Network()
    trainer(tmp_path, EMACallback(DECAY), model=whole, **SAVED).train()
    model = Network()
    run = trainer(tmp_path / "rest", EMACallback(**options), model=model)
    path = str(tmp_path / "checkpoint-8")
    if options == {"decay": DECAY}:
        run.train(path)
    else:
        with pytest.warns(
            UserWarning, match=r"continues with the schedule.*0\.8.*not with that of"
        ):
            run.train(path)
    assert_same(snapshot(model), snapshot(whole))


@pytest.mark.parametrize("at_end", ["average", "raw"])
@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_model_is_the_one_whose_average_is(
    tmp_path: Path, at_end: Any, limit: int | None
) -> None:
    # Large steps: the loss is greatest somewhere in the middle, and that is what is looked for.
    model, noting, ema = Network(), Noting(), EMACallback(0.5, at_end=at_end)
    run = trainer(
        tmp_path,
        noting,
        ema,
        model=model,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        save_total_limit=limit,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = int(np.argmax(losses))
    assert 0 < best < len(losses) - 1
    assert run.state.best_global_step == best + 1
    assert run.state.best_metric == losses[best]
    raw, average = noting.steps[best], model.evaluated[best]
    assert_same(snapshot(model), average if at_end == "average" else raw)
    assert run.evaluate()["eval_loss"] == losses[best]
    assert ema.ema.num_updates == best + 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_average, r"has no ema\.safetensors: the model holds its weights"),
        (
            change_one_weight,
            r"has the wrong ema\.safetensors \(.*other weights.*\): the model holds",
        ),
    ],
)
def test_a_best_model_whose_average_does_not_fit_is_taken_as_it_is(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    class Spoiling(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            spoil(tmp_path / f"checkpoint-{state.global_step}")

    model, noting, ema = Network(), Noting(), EMACallback(DECAY)
    run = trainer(tmp_path, noting, model=model, load_best_model_at_end=True, **EVERY_FOUR, **SAVED)
    ema.attach(run)
    run.add_callback(Spoiling())
    with pytest.warns(UserWarning, match=message):
        run.train()
    raw = load_file(f"{run.state.best_model_checkpoint}/model.safetensors")
    if spoil is lose_average:
        assert_same(raw, noting.steps[run.state.best_global_step - 1])
    assert_same(snapshot(model), raw)
    run.evaluate()
    assert_same(model.evaluated[-1], raw)


# -- copies and references ------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_of_the_callback_begin_anew(
    tmp_path: Path, trained: bool, copied: Callable[[Any], Any]
) -> None:
    ema = EMACallback(0.5, at_end="raw", update_every=2)
    run = trainer(tmp_path, ema)
    if trained:
        run.train()
    other = copied(ema)
    with pytest.raises(StateError, match="no average yet"):
        other.ema  # noqa: B018
    model = Network()
    trainer(tmp_path, other, model=model, **EVERY_FOUR).train()
    assert differ(model.evaluated[-1], snapshot(model))
    with other.swapped():
        assert_same(snapshot(model), model.evaluated[-1])
    assert other.ema.schedule.update_every == 2
    assert not trained or ema.ema.num_updates == STEPS


@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_of_a_trainer_has_an_average_of_its_own(tmp_path: Path, trained: bool) -> None:
    trainer(tmp_path / "saved", EMACallback(DECAY), **SAVED).train()
    ema = EMACallback(DECAY, at_end="raw")
    run = trainer(tmp_path, ema, **EVERY_FOUR)
    if trained:
        run.train()
    other = copy.deepcopy(run)
    model: Any = other.model
    (own,) = (one for one in other.callback_handler.callbacks if isinstance(one, EMACallback))
    assert own is not ema
    other.evaluate()
    assert_same(model.evaluated[-1], snapshot(model))  # there is no average yet
    before = snapshot(run.model)  # type: ignore[arg-type]
    other.train(str(tmp_path / "saved" / "checkpoint-8"))
    assert own.ema.num_updates == STEPS
    assert differ(model.evaluated[-1], snapshot(model))
    with own.swapped():
        assert_same(snapshot(model), model.evaluated[-1])
    assert_same(snapshot(run.model), before)  # type: ignore[arg-type]
    run.train()
    assert ema.ema.num_updates == STEPS
    mine: Any = run.model
    with ema.swapped():
        assert_same(snapshot(mine), mine.evaluated[-1])


@pytest.mark.parametrize("trained", [False, True])
def test_a_trainer_is_freed_as_it_is_without_an_average(tmp_path: Path, trained: bool) -> None:
    def is_freed(*callbacks: Any) -> bool:
        run = trainer(tmp_path, *callbacks)
        if trained:
            run.train()
        reference = weakref.ref(run)
        del run
        return reference() is None

    gc.collect()
    gc.disable()
    try:
        assert is_freed(EMACallback(DECAY)) is is_freed()
    finally:
        gc.enable()


class Odd:
    """In the stack, as stand-ins for other objects are."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def call(self, function: Callable[[], Any]) -> Any:
        return function()


def test_odd_objects_in_the_stack(tmp_path: Path) -> None:
    for around in (
        Odd().call,
        lambda function: Mock(side_effect=function)(),
        lambda function: MagicMock(side_effect=function)(),
    ):
        model, ema = Network(), EMACallback(DECAY, at_end="raw")
        run = around(lambda ema=ema, model=model: trainer(tmp_path, model=model, **EVERY_FOUR))
        run.add_callback(ema)
        around(run.train)
        assert differ(model.evaluated[-1], snapshot(model))
        begun = EMACallback(DECAY, evaluate_with_average=False)
        given = run.args, TrainerState(), run.control
        around(lambda begun=begun, given=given: begun.on_train_begin(*given, model=Network()))
        assert begun.ema.num_updates == 0


# -- what could go wrong --------------------------------------------------------------------------


class Failing(Network):
    error: BaseException = RuntimeError("in the middle")

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = super().forward(x, labels)
        if len(self.evaluated) == 2:
            raise self.error
        return found


@pytest.mark.parametrize("error", [RuntimeError("in the middle"), KeyboardInterrupt()])
def test_an_evaluation_that_fails_leaves_the_weights(tmp_path: Path, error: BaseException) -> None:
    model, noting, ema = Failing(), Noting(), EMACallback(DECAY)
    model.error = error
    begun = snapshot(model)
    run = trainer(tmp_path, noting, ema, model=model, **EVERY_FOUR)
    with pytest.raises(type(error)):
        run.train()
    assert len(noting.steps) == 8
    assert_same(snapshot(model), noting.steps[-1])
    assert_near(model.evaluated[-1], average_of(begun, noting.steps))
    assert not ema.ema.applied
    with ema.swapped():
        assert_same(snapshot(model), model.evaluated[-1])


def test_a_metric_that_fails_leaves_the_weights(tmp_path: Path) -> None:
    def wrong(found: Any) -> Any:
        raise ZeroDivisionError

    noting = Noting()
    run = trainer(tmp_path, noting, EMACallback(DECAY), **EVERY_FOUR)
    run.compute_metrics = wrong
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert_same(snapshot(run.model), noting.steps[-1])


class Applying(TrainerCallback):
    """Puts the average into the model and forgets it there."""

    def __init__(self, ema: EMACallback, event: str) -> None:
        self._ema = ema
        setattr(self, event, self._apply)

    def _apply(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            self._ema.ema.apply_shadow()


@pytest.mark.parametrize("event", ["on_step_begin", "on_save"])
def test_a_forgotten_average_is_never_trained(tmp_path: Path, event: str) -> None:
    ema, noting = EMACallback(DECAY), Noting()
    run = trainer(tmp_path, noting, Applying(ema, event), ema, **SAVED)
    with pytest.raises(StateError, match="while the average is in the model"):
        run.train()
    assert len(noting.steps) == 4
    ema.ema.restore()
    assert_same(snapshot(run.model), noting.steps[-1])


def test_without_evaluation_of_the_average(tmp_path: Path) -> None:
    model, noting = Network(), Noting()
    begun = snapshot(model)
    ema = EMACallback(DECAY, evaluate_with_average=False)
    run = trainer(tmp_path, noting, ema, model=model, **EVERY_FOUR)
    run.train()
    for evaluated, step in zip(model.evaluated, (3, 7, 11), strict=True):
        assert_same(evaluated, noting.steps[step])
    assert_near(snapshot(model), average_of(begun, noting.steps))


@pytest.mark.parametrize("full", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_sixteen_bits_after_training(tmp_path: Path, full: str) -> None:
    model, noting = Network(), Noting()
    run = trainer(tmp_path, noting, EMACallback(DECAY, at_end="raw"), model=model, **{full: True})
    begun = snapshot(model)
    run.train()
    run.evaluate()
    dtype = torch.bfloat16 if "bf16" in full else torch.float16
    want = average_of(begun, noting.steps)
    for name, value in model.evaluated[-1].items():
        if value.is_floating_point():
            assert value.dtype == dtype
            torch.testing.assert_close(value, want[name].to(dtype))
    # The Trainer leaves the model so.
    for name, value in snapshot(model).items():
        torch.testing.assert_close(value, noting.steps[-1][name].to(value.dtype), rtol=0, atol=0)


def test_several_sets_are_evaluated_with_the_average(tmp_path: Path) -> None:
    model, noting = Network(), Noting()
    run = trainer(tmp_path, noting, EMACallback(DECAY), model=model, **EVERY_FOUR)
    run.eval_dataset = {"one": data(8), "two": data(16)}
    run.train()
    assert "eval_two_loss" in run.state.log_history[-2]
    for k in range(3):
        first, *others = model.evaluated[3 * k : 3 * k + 3]
        assert differ(first, noting.steps[4 * k + 3])
        for other in others:
            assert_same(other, first)


def test_frozen_parameters_are_left_alone(tmp_path: Path) -> None:
    model = Network()
    model.first.requires_grad_(False)
    ema = EMACallback(DECAY, at_end="raw")
    trainer(tmp_path, ema, model=model, **EVERY_FOUR).train()
    assert not [name for name in ema.ema.shadow if name.startswith("first")]
    assert_same({"w": model.evaluated[-1]["first.weight"]}, {"w": Network().first.weight.detach()})


# -- models of the library ------------------------------------------------------------------------


def words(samples: int = 16, length: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 20, (samples, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def test_tied_weights_of_a_language_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    begun = {name: value.detach().clone() for name, value in model.named_parameters()}
    noted: list[State] = []

    class Parameters(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = kwargs["model"].named_parameters()
            noted.append({name: value.detach().clone() for name, value in named})

    ema = EMACallback(DECAY)
    run = trainer(tmp_path, Parameters(), ema, model=model, max_steps=6, **SAVED)
    run.train_dataset = run.eval_dataset = words()
    run.train()
    assert model.lm_head.weight is model.transformer.wte.weight
    average = {name: value.detach() for name, value in model.named_parameters()}
    assert_near(average, average_of(begun, noted))
    run.save_model()
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert_same(snapshot(loaded), snapshot(model))
    raw = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-6")
    assert_same({n: p.detach() for n, p in raw.named_parameters()}, noted[-1])

    resumed = GPT2LMHeadModel(config)
    rest = trainer(tmp_path / "rest", EMACallback(DECAY), model=resumed, max_steps=6)
    rest.train_dataset = words()
    rest.train(str(tmp_path / "checkpoint-4"))
    assert_same(snapshot(resumed), snapshot(model))


@contextmanager
def noting_encoder(model: Any, noted: list[State]) -> Iterator[None]:
    """What ``generate`` calls first is not ``forward``."""
    encoder = model.get_encoder()
    handle = encoder.register_forward_pre_hook(
        lambda module, args: None if module.training else noted.append(snapshot(model))
    )
    try:
        yield
    finally:
        handle.remove()


def test_generation_sees_the_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=20,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            max_position_embeddings=16,
            dropout=0.0,
        )
    )
    ema, noting, noted = EMACallback(DECAY, at_end="raw"), Noting(), []
    run = trainer(
        tmp_path, noting, ema, model=model, kind=Seq2SeqTrainer,
        arguments=Seq2SeqTrainingArguments, train_dataset=words(), eval_dataset=words(4),
        max_steps=4, eval_strategy="steps", eval_steps=2,
        predict_with_generate=True, generation_max_length=8,
    )  # fmt: skip
    with noting_encoder(model, noted):
        run.train()
        run.predict(words(4))
    assert len(noted) >= 3
    with ema.swapped():
        average = snapshot(model)
    assert_same(noted[-1], average)
    assert differ(noted[0], noting.steps[1])
    assert_same(snapshot(model), noting.steps[-1])
    for event, seen in noting.seen:
        assert event == "step" or any(
            not differ(seen, step) for step in (noting.steps[1], noting.steps[3])
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_model(tmp_path: Path) -> None:
    model, noting, ema = Network(), Noting(), EMACallback(DECAY)
    begun = snapshot(model)
    run = trainer(
        tmp_path,
        noting,
        ema,
        model=model,
        torch_compile=True,
        torch_compile_backend="eager",
        **EVERY_FOUR,
        **SAVED,
    )
    run.train()
    assert run.model_wrapped is not model
    assert_near(snapshot(model), average_of(begun, noting.steps))
    assert run.evaluate()["eval_loss"] == run.state.log_history[-1]["eval_loss"]
    resumed = Network()
    rest = trainer(tmp_path / "rest", EMACallback(DECAY), model=resumed)
    rest.train(str(tmp_path / "checkpoint-8"))
    assert_near(snapshot(resumed), snapshot(model))


PROCESSES = """
    import os, sys, warnings
    rank = os.fork() and 1
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=sys.argv[1],
    )
    warnings.simplefilter("ignore")
    import torch
    from transformers import Trainer, TrainingArguments
    from fastema.transformers import EMACallback

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 1)
        def forward(self, x, labels):
            if not self.training:
                seen.append(self.layer.weight.tolist())
            return {"loss": (self.layer(x) - labels).square().mean()}

    def run(folder, resumed=None):
        data = [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(16)]
        arguments = TrainingArguments(
            folder, use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=2, max_steps=6,
            eval_strategy="steps", eval_steps=3, save_steps=3, report_to="none",
            disable_tqdm=True, learning_rate=0.1, dataloader_pin_memory=False,
        )
        trainer = Trainer(Network(), arguments, train_dataset=data, eval_dataset=data)
        EMACallback(decay=0.5).attach(trainer)
        trainer.train(resumed)
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        return trainer.model.layer.weight.tolist()

    torch.manual_seed(1)
    seen = []
    whole = run(sys.argv[2])
    assert seen[-1] == whole
    torch.manual_seed(1)
    rest = run(sys.argv[2] + "/rest", sys.argv[2] + "/checkpoint-3")
    assert rest == whole, (rest, whole)
    both = [None, None]
    torch.distributed.all_gather_object(both, whole)
    assert both[0] == both[1]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank:
        assert os.wait()[1] == 0
        print("equal")
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_keep_one_average(python: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = python(PROCESSES, str(port), str(tmp_path), quiet=False)
    assert "equal" in printed
    assert (tmp_path / "checkpoint-6" / FILE).exists()


def test_each_trial_of_a_search_has_an_average_of_its_own(tmp_path: Path) -> None:
    """The steps of ``hyperparameter_search``, whose backends are packages of their own."""
    run = trainer(
        tmp_path, ema := EMACallback(DECAY), model_init=Network, load_best_model_at_end=True,
        **EVERY_FOUR, **SAVED,
    )  # fmt: skip
    for name in ("run-0", "run-1"):
        # As the backends make them.
        run._get_output_dir = lambda trial, name=name: str(tmp_path / name)
        initial = run._init_training_state

        def of_a_search(*args: Any, initial: Any = initial, **kwargs: Any) -> Any:
            found = initial(*args, **kwargs)
            run.state.is_hyper_param_search = True
            return found

        run._init_training_state = of_a_search
        run.train()
        assert (tmp_path / name / "checkpoint-12" / FILE).exists()
        model: Any = run.model
        assert run.evaluate()["eval_loss"] == run.state.best_metric
        assert ema.ema.num_updates == run.state.best_global_step
        assert differ(snapshot(model), snapshot(Network()))


def test_wrong_arguments(tmp_path: Path) -> None:
    for options, message in (
        ({"decay": 1.5}, "decay"),
        ({"at_end": "both"}, "at_end='both': expected one of average, raw"),
        ({"on_missing": "skip"}, "on_missing='skip': expected one of raise, begin"),
        ({"decay": (0.9, 0.99)}, "which=None: expected a number from 0 to 1"),
        ({"which": 1}, "which=1"),
        ({"frozen": "melt"}, "frozen"),
    ):
        with pytest.raises(ArgumentError, match=message):
            EMACallback(**options)
    with pytest.raises(ArgumentError, match=r"attach\(Linear\): expected a transformers.Trainer"):
        EMACallback().attach(torch.nn.Linear(1, 1))
    with pytest.raises(StateError, match="no average yet"):
        EMACallback().ema  # noqa: B018
    run = trainer(tmp_path, EMACallback())
    with pytest.raises(StateError, match=r"has an EMACallback already.*decay=\(0.99, 0.999\)"):
        EMACallback().attach(run)
    with pytest.raises(StateError, match="has an EMACallback already"):
        trainer(tmp_path, EMACallback(), EMACallback())


def test_sharded_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ema = EMACallback()
    run = trainer(tmp_path, ema)
    monkeypatch.setattr(run, "is_fsdp_enabled", True)
    with pytest.raises(ArgumentError, match="sharded"):
        ema.on_train_begin(run.args, run.state, run.control, model=run.model)


def test_events_without_a_trainer(tmp_path: Path) -> None:
    model = Network()
    run = trainer(tmp_path, model=model)
    args, state, control = run.args, run.state, run.control
    with pytest.raises(StateError, match="does not find the trainer"):
        EMACallback().on_train_begin(args, state, control, model=model)
    ema = EMACallback(DECAY, evaluate_with_average=False)
    ema.on_train_begin(args, state, control, model=model)
    begun = snapshot(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    step = copy.deepcopy(snapshot(model))
    ema.on_step_end(args, state, control, model=model)
    ema.on_train_end(args, state, control, model=model)
    assert_near(snapshot(model), average_of(begun, [step]))


def test_the_file_is_of_one_moment_while_another_thread_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(3, 2)
    callback = EMACallback(0.5)
    callback._ema = fastema.EMA(model, 0.5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    callback.ema.update()
    want = {name: one.clone() for name, one in callback.ema.shadow.items()}
    write, threads = fastema.transformers.weights.write_state, []

    def while_another_updates(*given: Any, **metadata: str) -> None:
        threads.append(threading.Thread(target=callback.ema.update))
        threads[-1].start()
        threads[-1].join(0.1)  # it comes to its end here if nothing holds it back
        write(*given, **metadata)

    monkeypatch.setattr(fastema.transformers.weights, "write_state", while_another_updates)
    callback._write(tmp_path, 1)
    threads[0].join()
    assert callback.ema.num_updates == 2
    found = load_file(tmp_path / FILE)
    assert all(torch.equal(found[f"shadow.0.{name}"], one) for name, one in want.items())
