"""Models with new random weights, and bitwise comparison of tensors."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


BUFFERS = frozenset({"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"})
"""The buffers of a `Net`."""


class Net(nn.Module):
    """Convolution, BatchNorm, linear layers: 1 to 4 dimensions, buffers, an integer counter."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, 5, bias=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.scale * self.head(torch.relu(self.hidden(features)))


def net(seed: int = 0, dtype: torch.dtype | None = None) -> Net:
    """Return a `Net` in which no tensor is zero or constant."""
    model = Net().to(dtype)
    refresh_(model, seed)
    return model


def layers(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Return a module without buffers."""
    model = nn.Sequential(nn.Linear(5, 17), nn.Linear(17, 3)).to(dtype)
    refresh_(model, seed)
    return model


def tensors_of(weights: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module, or the entries of a dict or a list."""
    if isinstance(weights, nn.Module):
        yield from weights.named_parameters(remove_duplicate=False)
        yield from weights.named_buffers(remove_duplicate=False)
    elif isinstance(weights, dict):
        yield from weights.items()
    else:
        yield from ((str(i), tensor) for i, tensor in enumerate(weights))


def refresh_(weights: Any, seed: int) -> None:
    """Fill every tensor with new numbers, like a training step."""
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in tensors_of(weights):
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                wide = torch.complex128 if tensor.is_complex() else torch.float64
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=wide))
            else:
                low, high = (0, 2) if tensor.dtype == torch.bool else (1, 100)
                tensor.copy_(torch.randint(low, high, tensor.shape, generator=generator))


def train_(weights: Any, steps: Iterable[int], *averages: Any) -> None:
    """Fill the weights with new numbers at each step, and update all averages."""
    for step in steps:
        refresh_(weights, step)
        for one in averages:
            one.update()


def poison_(tensors: Iterable[Tensor]) -> None:
    """Fill memory that must no longer be read with NaN, or with the largest integer."""
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            value = float("nan")
        else:
            value = True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
        tensor.detach().fill_(value)


def bits(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor's bytes, in index order."""
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copied.reshape(-1).view(torch.uint8)


def snapshot(weights: Any) -> dict[str, Tensor]:
    """Return the bytes of every tensor, by name."""
    return {name: bits(tensor) for name, tensor in tensors_of(weights)}


def values(weights: Any) -> dict[str, Tensor]:
    """Return a copy of every tensor, by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(weights)}


def assert_bits(actual: Any, expected: dict[str, Tensor]) -> None:
    """Assert that every tensor has exactly the bytes of a snapshot."""
    assert_same(snapshot(actual), expected)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two snapshots are equal."""
    assert actual.keys() == expected.keys()
    differing = [name for name in actual if not torch.equal(actual[name], expected[name])]
    assert not differing


def assert_average(
    ema: Any,
    old: dict[str, Tensor],
    new: dict[str, Tensor],
    weight: float,
    copied: Collection[str] = BUFFERS,
) -> None:
    """Assert ``old + weight * (new - old)`` within a few roundings, or copies of ``new``."""
    for name, tensor in ema.shadow.items():
        if name in copied or not tensor.is_floating_point():
            assert torch.equal(tensor, new[name].to(tensor.dtype)), f"{name} is not a copy"
            continue
        expected = old[name].double().lerp(new[name].double(), weight)
        last_place = 4 * torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.double(), expected, rtol=last_place, atol=last_place)
