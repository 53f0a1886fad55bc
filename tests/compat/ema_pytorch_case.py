"""The model and the helpers that the tests of the ema_pytorch drop-ins share."""

from collections.abc import Iterable
from typing import Any

import ema_pytorch as theirs
import torch
from torch import nn

from fastema.compat import ema_pytorch as ours

NEEDS = ("ema_pytorch",)


class Network(nn.Module):
    """Odd shapes and strides; tied, frozen, empty and 0-d parameters; all kinds of buffers."""

    def __init__(self, seed: int = 0, dtype: Any = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.register_buffer("table", torch.zeros(3, 4).t())
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.to(dtype)
        self.conv.to(memory_format=torch.channels_last)
        for tensor in floats(self).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Any) -> Any:
        return self.head(x) * self.scale


def floats(model: Any) -> dict[str, Any]:
    """Return the float parameters and buffers by name, tied ones once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


def values(model: Any) -> dict[str, Any]:
    """Return copies of all parameters and buffers by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def train(models: Any, seed: int, step: int) -> None:
    """Take the same random step in each of these equal models."""
    for model in models:
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        for tensor in floats(model).values():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.add_(noise.to(tensor.dtype))
        model.norm.num_batches_tracked.add_(1)
        model.mask.logical_not_()


def twins(count: int = 2, seed: int = 0, dtype: Any = torch.float64) -> list[Any]:
    return [Network(seed, dtype) for _ in range(count)]


def pair(
    name: str = "EMA", *, seed: int = 0, dtype: Any = torch.float64, **settings: Any
) -> tuple[Any, Any]:
    """Build our class and theirs on two equal models; only ours takes ``peer_exact``."""
    mine, yours = twins(2, seed, dtype)
    known = {key: value for key, value in settings.items() if key != "peer_exact"}
    return getattr(ours, name)(mine, **settings), getattr(theirs, name)(yours, **known)


def run(emas: Any, steps: Iterable[int], seed: int = 1) -> None:
    for step in steps:
        train([ema.model for ema in emas], seed, step)
        for ema in emas:
            ema.update()


def assert_close(one: Any, other: Any, atol: float) -> None:
    """Assert that the float tensors of two models are close, by name."""
    torch.testing.assert_close(floats(one), floats(other), atol=atol, rtol=0.0)
