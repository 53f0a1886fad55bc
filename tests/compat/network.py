"""A model with every kind of tensor that an average meets, and its average in float64."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ..average.truth import Loop, arithmetic_of
from ..support.peers import is_float, named_tensors

CODES = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class Network(nn.Module):
    """Odd shapes and strides; scalar, empty, tied and frozen weights; all kinds of buffers."""

    def __init__(
        self,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        integers: bool = True,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm: nn.Module = nn.BatchNorm2d(4) if integers else nn.GroupNorm(2, 4)
        self.head = nn.Linear(5, 7)
        if tied:
            self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.empty(33), requires_grad=False)
        self.transposed = nn.Parameter(torch.empty(6, 4).t())
        self.scalar = nn.Parameter(torch.empty(()))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.wide = nn.Parameter(torch.empty(257, dtype=torch.float64))
        self.register_buffer("scale", torch.empty(3, 2, dtype=torch.float64))
        self.register_buffer("cache", torch.empty(4), persistent=False)
        if integers:
            self.register_buffer("places", torch.zeros(2, 3, dtype=torch.int64))
            self.register_buffer("mask", torch.zeros(9, dtype=torch.bool))
        if dtype is not None:
            self.to(dtype)
        randomize(self, make_generator(seed))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Randomize weights and buffers; integers get values that float32 cannot hold."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        for buffer in model.buffers():
            if buffer.dtype == torch.bool:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) < 0.5)
            elif buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            else:
                buffer.copy_(torch.randint(2**24, 2**52, buffer.shape, generator=generator))


def move_parameters(model: nn.Module) -> None:
    """Move each parameter's data to new memory, values unchanged."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def save_and_load(state: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def array(tensor: Tensor) -> Any:
    return tensor.detach().double().numpy()


def bits(model: nn.Module | dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: tensor.detach().clone().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in named_tensors(model).items()
        if tensor.numel()
    }


class Truth:
    """The reference average of a model, in float64 loops; other tensors are only copied."""

    def __init__(
        self,
        averaged: nn.Module | dict[str, Tensor],
        model: nn.Module,
        which: Callable[[str, Tensor], bool] = is_float,
        random: bool = True,
    ) -> None:
        weights, self.loops = named_tensors(model), dict[str, Loop]()
        for name, tensor in named_tensors(averaged).items():
            if which(name, weights[name]) and tensor.is_floating_point():
                stored = CODES[tensor.dtype]
                arithmetic = arithmetic_of(CODES[weights[name].dtype], stored)
                narrow = stored in ("f16", "bf16")
                self.loops[name] = Loop(array(tensor), stored, arithmetic, random and narrow)

    def step(self, model: nn.Module, weight: float) -> None:
        for name, tensor in named_tensors(model).items():
            if name in self.loops:
                self.loops[name].step(array(tensor), weight)

    def train(
        self,
        model: nn.Module,
        generator: torch.Generator,
        weight: float,
        *updates: Callable[[nn.Module], Any],
    ) -> None:
        """Randomize the model, then update the reference and the averages by ``updates``."""
        randomize(model, generator)
        self.step(model, weight)
        for update in updates:
            update(model)

    def check(self, averaged: nn.Module | dict[str, Tensor], model: nn.Module) -> None:
        """Check averages against their bounds, the rest against the model; ignore ``cache``."""
        assert self.loops
        weights = named_tensors(model)
        for name, tensor in named_tensors(averaged).items():
            if name in self.loops:
                self.loops[name].check(array(tensor), name)
            elif name != "cache":
                assert np.array_equal(array(tensor), array(weights[name])), name
                assert torch.equal(tensor, weights[name].to(tensor.dtype)), name


@contextmanager
def assert_refused(error: Any, words: str | None, *sides: Any) -> Iterator[None]:
    """Assert that the block raises and changes no bit of these modules, dicts or lists."""

    def state() -> list[dict[str, bytes]]:
        lists = (dict(enumerate(side)) if isinstance(side, list) else side for side in sides)
        return [bits(side) for side in lists]

    before = state()
    with pytest.raises(error, match=words):
        yield
    assert state() == before
