"""Self-distillation: a model is taught by its own average, and learns less of what is wrong.

A small network learns to read digits of which half have a random label. It learns the wrong ones by
heart; its average over the run less so. Taught in part by that average, it hardly does. The teacher
is the model called with the averaged weights: there is no second model.

    pip install fastema torch scikit-learn
    python examples/self_distillation.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import fastema

TRAINED = 1200
"""Images that are trained on; the other 597 are for the test."""


def load(wrong: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images, their digits, and labels of which a share is random."""
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


def train(steps: int, share: float, seed: int = 0) -> tuple[float, float]:
    """Accuracy of the model and of its average, where the teacher has this share of the loss."""
    torch.manual_seed(seed)
    images, digits, labels = load(wrong=0.5)
    model = nn.Sequential(
        *(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    ema = fastema.EMA(model, decay=0.998)
    ema.follow(optimizer)  # updates after each of its steps
    for step in range(steps):
        batch = torch.randint(TRAINED, (128,))
        with torch.no_grad():
            weights = dict(ema.shadow)
            taught = torch.func.functional_call(model, weights, (images[batch],)).softmax(1)
        answers = model(images[batch])
        now = share * min(1.0, step / (0.2 * steps))  # the teacher knows nothing at first
        loss = (1 - now) * functional.cross_entropy(answers, labels[batch])
        loss = loss + now * functional.cross_entropy(answers, taught)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def accuracy() -> float:
        with torch.no_grad():
            right = model(images[TRAINED:]).argmax(1) == digits[TRAINED:]
        return right.float().mean().item()

    trained = accuracy()
    with ema.swapped():
        return trained, accuracy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    for share in (0.0, 0.9):
        model, average = train(given.steps, share)
        how = f"{share:.0%} by its average" if share else "labels alone"
        print(f"{how:<20}model {model:.1%}   average {average:.1%}")


if __name__ == "__main__":
    main()
