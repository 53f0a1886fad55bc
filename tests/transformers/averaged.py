"""Trainers of that network with an average of its weights."""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import Trainer

from fastema.transformers import EMACallback

from .network import DECAY, Network, Noting
from .runs import quiet_trainer


def trainer(folder: Path, *callbacks: Any, model: Any = None, **options: Any) -> Trainer:
    names = ("model_init", "optimizers", "train_dataset", "eval_dataset")
    given = {name: options.pop(name) for name in names if name in options}
    if "model_init" not in given:
        given["model"] = model or Network()
    settings = {"num_train_epochs": 2, "per_device_eval_batch_size": 8, "logging_steps": 100}
    return quiet_trainer(folder, *callbacks, given=given, **{**settings, **options})


class Run(NamedTuple):
    """A trainer, its model, a callback that looks on, and the average that comes after it."""

    trainer: Trainer
    model: Any
    noting: Noting
    ema: EMACallback


def prepared(
    folder: Path,
    ema: EMACallback | None = None,
    *,
    first: list[Any] | None = None,
    model: Any = None,
    **options: Any,
) -> Run:
    model, noting, ema = model or Network(), Noting(), ema or EMACallback(DECAY)
    made = trainer(folder, *(first or []), noting, ema, model=model, **options)
    return Run(made, model, noting, ema)


def trained(
    folder: Path, ema: EMACallback | None = None, *, resume: Any = None, **options: Any
) -> Run:
    """As ``prepared``, trained, from a checkpoint perhaps."""
    run = prepared(folder, ema, **options)
    run.trainer.train(str(resume) if resume else None)
    return run
