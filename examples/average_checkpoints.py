"""Average the last ten finished checkpoints in a folder with `fastema average`.

pip install fastema torch scikit-learn safetensors
python examples/average_checkpoints.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from digits import TRAINED, accuracy, load, network, report
from safetensors.torch import load_file
from torch.nn import functional

from fastema.cli import main as fastema


def main() -> None:
    images, digits, labels = load()
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with tempfile.TemporaryDirectory() as folder:
        for step in range(1, 801):
            batch = torch.randint(TRAINED, (128,))
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                torch.save(model.state_dict(), Path(folder) / f"step-{step}.pt")
        out = Path(folder) / "mean.safetensors"
        fastema(["average", "--dir", folder, "--last", "10", "-o", str(out)])
        trained = accuracy(model, images, digits)
        model.load_state_dict(load_file(out))
    report(trained, accuracy(model, images, digits))


if __name__ == "__main__":
    main()
