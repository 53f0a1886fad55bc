"""Self-distillation: a model taught by its own average memorizes fewer wrong labels.

A small network learns to read digits, and half of the labels are random. It memorizes the wrong
labels; its average does so less. If the average teaches it in part, it hardly memorizes them. The
teacher is the model called with the averaged weights: there is no second model.

    pip install fastema torch scikit-learn
    python examples/self_distillation.py
"""

from __future__ import annotations

import argparse

import torch
from digits import TRAINED, accuracy, load, network
from torch.nn import functional

import fastema


def train(steps: int, share: float, seed: int = 0) -> tuple[float, float]:
    """Train with a `share` of the loss from the teacher; return both accuracies."""
    images, digits, labels = load(seed=seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    ema = fastema.EMA(model, decay=0.998)
    ema.follow(optimizer)  # update after each optimizer step
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

    trained = accuracy(model, images, digits)
    with ema.swapped():
        return trained, accuracy(model, images, digits)


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
