"""Lists of parameters, and the reference averages of them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..average.truth import Loop
from .network import CODES, array, make_generator

Parameters = list[Any]

SHAPES = [(5, 7), (3,), (), (0, 4), (1, 1, 33), (257,)]
FROZEN = (1, 6)


def parameters(seed: int = 0, dtypes: Iterable[torch.dtype] = (torch.float32,)) -> Parameters:
    """Return parameters: odd shapes, a scalar, empty and strided ones; two are frozen."""
    generator, kinds = make_generator(seed), list(dtypes)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    made.append(torch.randn(6, 4, generator=generator).t())
    image = torch.randn(2, 3, 4, 5, generator=generator)
    made.append(image.to(memory_format=torch.channels_last))
    found = [nn.Parameter(one.to(kinds[at % len(kinds)])) for at, one in enumerate(made)]
    for at in FROZEN:
        found[at].requires_grad_(False)
    return found


def perturb(weights: Iterable[Any], generator: torch.Generator, size: float = 1.0) -> None:
    with torch.no_grad():
        for one in weights:
            one.add_(size * torch.randn(one.shape, generator=generator).to(one.dtype))


def copies_of(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [one.detach().clone() for one in tensors]


def are_equal(tensors: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    return all(
        one.dtype == other.dtype and torch.equal(one.detach(), other.detach())
        for one, other in zip(tensors, others, strict=True)
    )


def write_into(weights: Iterable[Any], contents: Iterable[torch.Tensor]) -> None:
    with torch.no_grad():
        for one, value in zip(weights, contents, strict=True):
            one.copy_(value)


class ListTruth:
    """Reference averages in float64 loops; ``copied``: frozen parameters are copied instead."""

    def __init__(self, weights: Parameters, random: bool = False, copied: bool = False) -> None:
        self.loops = []
        self.copied = copied
        for one in weights:
            stored = CODES[one.dtype]
            arithmetic = "f64" if stored == "f64" else "f32"
            self.loops.append(Loop(array(one), stored, arithmetic, random and stored != "f64"))

    def step(self, weights: Parameters, weight: float) -> None:
        for loop, one in zip(self.loops, weights, strict=True):
            loop.step(array(one), 1.0 if self.copied and not one.requires_grad else weight)

    def check(self, averages: Iterable[torch.Tensor]) -> None:
        for at, (loop, one) in enumerate(zip(self.loops, averages, strict=True)):
            loop.check(array(one), f"number {at}")
