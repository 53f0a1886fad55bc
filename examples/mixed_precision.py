"""Average a bfloat16 model in float32, in bfloat16, and in bfloat16 with rounding to nearest.

Rounded to nearest, an average stalls: an update is smaller than half of its last digit.

    pip install fastema torch scikit-learn
    python examples/mixed_precision.py
"""

from __future__ import annotations

import torch
from digits import TRAINED, accuracy, load, network
from torch.nn import functional

import fastema


def main() -> None:
    images, digits, labels = load()
    model = network().bfloat16()
    images = images.bfloat16()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    averages = {
        "in float32": fastema.EMA(model, decay=0.998, shadow_dtype="float32"),
        "in bfloat16, stochastic": fastema.EMA(model, decay=0.998),
        "in bfloat16, nearest": fastema.EMA(model, decay=0.998, rounding="nearest"),
    }
    for _ in range(400):
        batch = torch.randint(TRAINED, (128,))
        functional.cross_entropy(model(images[batch]).float(), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for ema in averages.values():
            ema.update()

    print(f"{'weights':<38}{accuracy(model, images, digits):.1%}")
    for name, ema in averages.items():
        with ema.swapped():
            print(f"{'average ' + name:<38}{accuracy(model, images, digits):.1%}")


if __name__ == "__main__":
    main()
