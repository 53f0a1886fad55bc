"""Models with an average on the host, and how they are trained."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import fastema


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    model[0].bias.requires_grad_(False)
    return model.to(dtype)


def move(model: nn.Module, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    with torch.no_grad():
        for one in model.state_dict().values():
            if one.is_floating_point():
                one.add_(torch.randn(one.shape, generator=generator).to(one.dtype))
            else:
                one.add_(1)


def assert_same(one: Any, other: Any) -> None:
    assert one.num_updates == other.num_updates
    assert list(one.shadow) == list(other.shadow)
    for name, wanted in other.shadow.items():
        assert one.shadow[name].dtype == wanted.dtype
        assert torch.equal(one.shadow[name], wanted), name


def assert_all_same(several: Any, others: Any) -> None:
    """Assert that mappings of names to tensors are equal, one by one."""
    for one, other in zip(several, others, strict=True):
        assert list(one) == list(other)
        for name in other:
            assert torch.equal(one[name], other[name]), name


OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16 with float32": (torch.bfloat16, {"shadow_dtype": "float32"}),
    "two halves": (torch.bfloat16, {"shadow_dtype": "bf16+16"}),
    "random bits": (torch.bfloat16, {"seed": 3}),
    "several": (torch.float32, {"decay": (0.5, 0.9), "update_every": 2}),
    "all averaged": (torch.float32, {"buffers": "average", "frozen": "copy"}),
    "patterns": (torch.float32, {"policy": {"1.*": "skip", "2.*": "average"}}),
    "debiased, later": (torch.float32, {"zero_debias": True, "start_after": 2}),
}


@pytest.fixture(params=OPTIONS)
def both(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Any]:
    """A model with an average on the host, and one beside it."""
    dtype, options = OPTIONS[request.param]
    model = build(dtype)
    options = {"decay": 0.75, **options}
    offloaded = fastema.EMA(model, offload=True, **options)
    return model, offloaded, fastema.EMA(model, **options)


def train(model: nn.Module, averages: tuple[Any, ...], steps: int = 5) -> None:
    for n in range(steps):
        averages[0].wait()
        move(model, n)
        for one in averages:
            one.update()


class SlowLink:
    """A link that waits before each tensor until ``go`` is set, and records what happens."""

    def __init__(self, ema: Any) -> None:
        self.go, self.events = threading.Event(), []
        ema._link.delay = self

    def __call__(self, number: int) -> None:
        self.events.append(f"copy {number}")
        assert self.go.wait(20)
