"""The task that the other examples share: handwritten digits and a small network.

At a high learning rate, a model moves around the best weights, and its average lies closer to them.
Half of the labels are random, so that there is noise to average out.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

TRAINED = 1200
"""Number of training images; the other 597 are the test set."""


def load(wrong: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, their digits, and labels; a share `wrong` of the labels is random."""
    torch.manual_seed(seed)
    data, target = load_digits(return_X_y=True)
    order = torch.randperm(len(data))
    images, digits = (
        torch.tensor(data, dtype=torch.float32)[order] / 16,
        torch.tensor(target)[order],
    )
    labels = digits.clone()
    spoilt = torch.rand(len(labels)) < wrong
    labels[spoilt] = torch.randint(10, (int(spoilt.sum()),))
    return images, digits, labels


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, digits: Tensor) -> float:
    """Return the share of test images that a model classifies correctly."""
    device = next(model.parameters()).device
    right = model(images[TRAINED:].to(device)).argmax(1).cpu() == digits[TRAINED:]
    return right.float().mean().item()


def report(trained: float, averaged: float) -> None:
    print(f"weights {trained:.1%}   average {averaged:.1%}")
