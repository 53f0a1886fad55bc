"""Three small networks for 8 x 8 images in ten classes, in plain PyTorch.

None of them uses batch normalization: its running statistics belong to the raw weights, and
recomputing them for the averaged weights would be a second lesson in the same demo.
"""

from __future__ import annotations

from torch import Tensor, nn

CLASSES = 10


def mlp(width: int = 768) -> nn.Module:
    """Return an MLP with three hidden layers of `width` units."""
    return nn.Sequential(
        nn.Flatten(),  # (batch, 64)
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def cnn(width: int = 32) -> nn.Module:
    """Return a CNN: four 3 x 3 convolutions at two resolutions, then a wide hidden layer."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # (batch, 2 width, 4, 4)
        nn.Conv2d(2 * width, 4 * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4 * width, 4 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # (batch, 4 width, 2, 2)
        nn.Flatten(),
        nn.Linear(16 * width, 1024),
        nn.ReLU(),
        nn.Linear(1024, CLASSES),
    )


class ResidualBlock(nn.Module):
    """``x + f(x)`` with two convolutions, each after a group normalization and a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, width, h, w)
        """Apply the block, which keeps the shape."""
        out: Tensor = x + self.body(x)
        return out


def resnet(width: int = 48) -> nn.Module:
    """Return a ResNet of three blocks on 4 x 4 maps: fewer parameters than `cnn`, more tensors."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),  # (batch, 2 width, 4, 4)
        ResidualBlock(2 * width),
        ResidualBlock(2 * width),
        ResidualBlock(2 * width),
        nn.GroupNorm(8, 2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, CLASSES),
    )


def build(name: str) -> nn.Module:
    """Return a new ``cnn``, ``resnet`` or ``mlp``: 0.8, 0.5 and 1.2 million parameters."""
    return {"cnn": cnn, "resnet": resnet, "mlp": mlp}[name]()
