"""A module that only has parameters, and random data to fill it."""

from __future__ import annotations

import torch
from torch import nn

from bench.race.shapes import Inventory

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
STD = 0.02  # standard deviation of freshly initialized transformer weights


class FlatModule(nn.Module):
    """Parameters with the names and shapes of an inventory; dots in names become ``__``."""

    def __init__(self, inventory: Inventory, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in inventory:
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
            self.register_parameter(name.replace(".", "__"), parameter)


@torch.no_grad()
def randomise_(model: nn.Module, seed: int) -> None:
    """Fill the parameters with normal random numbers, mean 0 and standard deviation `STD`.

    Benchmarks must not run on zeros or uninitialized memory: an update of denormals takes 50 to
    200 times as long, and pages that were never written cause no memory traffic.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0.0, STD, generator=generator)


def build(inventory: Inventory, weight_dtype: str, seed: int = 0) -> FlatModule:
    """Return a `FlatModule` with random weights."""
    model = FlatModule(inventory, DTYPES[weight_dtype])
    randomise_(model, seed)
    return model
