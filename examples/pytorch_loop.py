"""A PyTorch loop: follow the optimizer, then evaluate, save and load the average.

pip install fastema torch scikit-learn
python examples/pytorch_loop.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from digits import TRAINED, accuracy, load, network, report
from torch.nn import functional

import fastema
from fastema.checkpoint import load_into, save


def main() -> None:
    images, digits, labels = load()
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    ema = fastema.EMA(model, decay=0.998)
    ema.follow(optimizer)  # or ema.update() after each optimizer.step()
    for _ in range(800):
        batch = torch.randint(TRAINED, (128,))
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()

    trained = accuracy(model, images, digits)
    with ema.swapped():  # the model holds the average in this block
        report(trained, accuracy(model, images, digits))
    print(ema.report())

    with tempfile.TemporaryDirectory() as folder:
        save(ema, Path(folder) / "ema.safetensors")
        other = fastema.EMA(model, decay=0.998)
        load_into(other, Path(folder) / "ema.safetensors")
    print(f"loaded: {other}")


if __name__ == "__main__":
    main()
