"""Models and lists of tensors whose values come from the hash, and what is read from an average."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from .inputs import integers, numbers

TORCH = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CODES = {dtype: code for code, dtype in TORCH.items()}
STEPS = 50


class Net(nn.Module):
    """Parameters of 0 to 3 dimensions, strided, with an offset, empty, frozen, tied; buffers."""

    def __init__(self, code: str = "f32") -> None:
        super().__init__()
        dtype = TORCH[code]
        self.long = nn.Parameter(torch.zeros(70, dtype=dtype))
        self.cube = nn.Parameter(torch.zeros(2, 3, 5, dtype=dtype))
        self.turned = nn.Parameter(torch.zeros(3, 5, dtype=dtype).t())
        self.offset = nn.Parameter(torch.zeros(40, dtype=dtype)[3:36])
        self.number = nn.Parameter(torch.zeros((), dtype=dtype))
        self.empty = nn.Parameter(torch.zeros(0, 2, dtype=dtype))
        self.frozen = nn.Parameter(torch.zeros(9, dtype=dtype), requires_grad=False)
        self.part = nn.Module()
        self.part.tied = self.long
        self.register_buffer("mean", torch.zeros(7, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2, dtype=dtype), persistent=False)
        self.eval()

    def forward(self, x: Any) -> Any:
        return x * self.number


def tensors_of(weights: Any) -> dict[str, Any]:
    """Return the tensors of a module, a dict or a list by name, tied ones once."""
    if isinstance(weights, nn.Module):
        return {**dict(weights.named_parameters()), **dict(weights.named_buffers())}
    return dict(weights.items() if isinstance(weights, dict) else enumerate(weights))


@torch.no_grad()
def fill(weights: Any, step: int) -> Any:
    """Write the values of a step into all tensors, in place; return the weights."""
    for name, one in tensors_of(weights).items():
        if one.is_floating_point():
            one.copy_(torch.tensor(numbers(str(name), step, tuple(one.shape), CODES[one.dtype])))
        else:
            one.copy_(torch.tensor(integers(str(name), step, tuple(one.shape))))
    return weights


def net(code: str = "f32") -> Net:
    """Return a Net with the values of step 0."""
    return fill(Net(code), 0)


def train(weights: Any, *averages: Any, steps: Iterable[int] = range(1, STEPS + 1)) -> None:
    """Fill the weights at each step, and update the averages."""
    for step in steps:
        fill(weights, step)
        for one in averages:
            one.update()
            if hasattr(one, "wait"):
                one.wait()  # an offloaded update still reads the weights


def values(weights: Any) -> dict[str, Any]:
    """Return copies of the tensors."""
    return {str(name): one.detach().clone() for name, one in tensors_of(weights).items()}


def versions(weights: Any) -> dict[str, int]:
    """Return torch's counters of writes."""
    return {str(name): one._version for name, one in tensors_of(weights).items()}


def read(average: Any) -> dict[str, Any]:
    """Return everything a user can read from one of fastema's averages."""
    return {
        "shadows": [dict(one) for one in average.shadows],
        "num_updates": average.num_updates,
        "num_skipped": average.num_skipped,
        "version": average.version,
        "decay": average.decay,
        "applied": average.applied,
    }


def are_independent(a: Any, b: Any) -> bool:
    """Return whether two mappings of tensors share no memory."""
    pointers = {one.data_ptr() for one in a.values() if one.numel()}
    return not any(one.data_ptr() in pointers for one in b.values() if one.numel())


def as_numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().double().numpy()
