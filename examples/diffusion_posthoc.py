"""Diffusion: train once, then choose the width of the average (Karras et al., 2023).

A small network learns to denoise points on two moons. Training saves snapshots of two
power-function averages. Afterwards, averages of five widths are synthesized from the snapshots, and
their losses are measured.

    pip install fastema torch scikit-learn
    python examples/diffusion_posthoc.py
"""

from __future__ import annotations

import tempfile

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

import fastema

STEPS, EVERY = 1000, 25


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
    )


def loss_of(model: nn.Module, points: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the mean squared error of the noise that the model predicts at noise levels sigma."""
    noisy = (points + sigma * noise) / (1 + sigma.square()).sqrt()
    return (model(torch.cat([noisy, sigma.log() / 4], 1)) - noise).square().mean()


def draw(points: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw points, noise, and noise levels."""
    chosen = points[torch.randint(len(points), (count,))]
    return chosen, torch.randn(count, 2), torch.exp(1.2 * torch.randn(count, 1) - 1.2)


def main() -> None:
    torch.manual_seed(0)
    moons, _ = make_moons(20_000, noise=0.05, random_state=0)
    points = torch.tensor(moons, dtype=torch.float32)
    test = draw(points, 5_000)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ema = fastema.PowerEMA(model, sigma_rels=(0.05, 0.10))
    with tempfile.TemporaryDirectory() as folder:
        for step in range(1, STEPS + 1):
            loss_of(model, *draw(points, 128)).backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            if step % EVERY == 0:
                fastema.posthoc.save_snapshot(ema, folder)
        with torch.no_grad():
            print(f"weights            loss {loss_of(model, *test):.4f}")
            averaged = network()
            for width in (0.03, 0.05, 0.10, 0.15, 0.20):
                fastema.posthoc.synthesize(folder, sigma_rel=width, step=STEPS, into=averaged)
                print(f"sigma_rel = {width:.2f}   loss {loss_of(averaged, *test):.4f}")


if __name__ == "__main__":
    main()
