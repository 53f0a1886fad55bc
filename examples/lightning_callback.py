"""Lightning: validation uses the average; checkpoints hold the weights and the average.

pip install fastema lightning scikit-learn
python examples/lightning_callback.py
"""

from __future__ import annotations

import logging
import warnings

import lightning
import torch
from digits import TRAINED, accuracy, load, network, report
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fastema.lightning import EMACallback


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        return functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images, digits, labels = load()
    data = TensorDataset(images[:TRAINED], labels[:TRAINED])
    module = Module()
    callback = EMACallback(0.995, at_end="raw")
    trainer = lightning.Trainer(
        max_epochs=40,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=128, shuffle=True))
    trained = accuracy(module.network, images, digits)
    with callback.ema.swapped():
        report(trained, accuracy(module.network, images, digits))


if __name__ == "__main__":
    main()
