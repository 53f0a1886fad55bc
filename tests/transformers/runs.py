"""Data and trainers of the tests that run the Hugging Face Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from fastema.transformers import EMACallback

MARKS = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found:UserWarning"),
]


def data(samples: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(samples, 1, generator=generator)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def quiet_trainer(
    folder: Path,
    *callbacks: Any,
    kind: type[Trainer] = Trainer,
    arguments: type[TrainingArguments] = TrainingArguments,
    given: dict[str, Any],
    **options: Any,
) -> Trainer:
    """Build a CPU trainer that reports and saves only what the options ask for.

    Averages among the callbacks are attached to it.
    """
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = arguments(**{**settings, **options})
    datasets = {"train_dataset": data(), "eval_dataset": data(8)}
    trainer = kind(args=args, callbacks=list(callbacks), **{**datasets, **given})
    for callback in callbacks:
        if isinstance(callback, EMACallback):
            callback.attach(trainer)
    return trainer
