"""The Hugging Face Trainer: evaluation uses the average, and checkpoints hold it.

pip install fastema torch transformers accelerate scikit-learn
python examples/trainer_callback.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from digits import TRAINED, accuracy, load, network, report
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from fastema.transformers import EMACallback


class Classifier(torch.nn.Module):
    """A model for the Trainer: with labels, it returns the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        answers = self.layers(images)
        if labels is None:
            return (answers,)
        return functional.cross_entropy(answers, labels), answers


def main() -> None:
    images, digits, labels = load()
    data = [{"images": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    model, callback = Classifier(), EMACallback(decay=0.998, at_end="raw")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=800,
                per_device_train_batch_size=128,
                learning_rate=2e-3,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=data[:TRAINED],
        )
        callback.attach(trainer)
        trainer.train()
    trained = accuracy(model.layers, images, digits)
    with callback.swapped():
        report(trained, accuracy(model.layers, images, digits))


if __name__ == "__main__":
    main()
