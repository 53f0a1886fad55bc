"""Trainers of the recording network with an average of its weights."""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import Trainer

from fastema.transformers import EMACallback

from .network import DECAY, Network, Recorder
from .runs import quiet_trainer


def trainer(folder: Path, *callbacks: Any, model: Any = None, **options: Any) -> Trainer:
    names = ("model_init", "optimizers", "train_dataset", "eval_dataset")
    given = {name: options.pop(name) for name in names if name in options}
    if "model_init" not in given:
        given["model"] = model or Network()
    settings = {"num_train_epochs": 2, "per_device_eval_batch_size": 8, "logging_steps": 100}
    return quiet_trainer(folder, *callbacks, given=given, **{**settings, **options})


class Run(NamedTuple):
    """A trainer, its model, a recorder, and the EMA callback that comes after the recorder."""

    trainer: Trainer
    model: Any
    recorder: Recorder
    ema: EMACallback


def prepare_run(
    folder: Path,
    ema: EMACallback | None = None,
    *,
    first: list[Any] | None = None,
    model: Any = None,
    **options: Any,
) -> Run:
    model, recorder, ema = model or Network(), Recorder(), ema or EMACallback(DECAY)
    made = trainer(folder, *(first or []), recorder, ema, model=model, **options)
    return Run(made, model, recorder, ema)


def train_run(
    folder: Path, ema: EMACallback | None = None, *, resume: Any = None, **options: Any
) -> Run:
    """Prepare a run and train it, optionally from a checkpoint."""
    run = prepare_run(folder, ema, **options)
    run.trainer.train(str(resume) if resume else None)
    return run
