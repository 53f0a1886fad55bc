"""Tensors with more elements than a signed 32-bit integer counts."""

import numpy as np
import pytest
import torch
from torch import Tensor

import fastema

from ..support import reference
from ..support.tolerance import unit_roundoff
from .given import host

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

DECAY = 0.9
PART = 1 << 26


def element_count(device: torch.device) -> int:
    """Return a number just above 2**31 on a GPU, and a small one on a CPU, tested elsewhere."""
    return 2**31 + 12_345 if device.type == "cuda" else 300_007


def require_memory(device: torch.device, nbytes: int) -> None:
    """Skip the test if the device has less memory free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if free < nbytes:
            pytest.skip(f"needs {nbytes / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are free")


def fill_random(tensor: Tensor, seed: int) -> None:
    """Fill a large tensor with normal numbers."""
    tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(seed))


def split_into_parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors into the same slices, none of them large."""
    length = tensors[0].numel()
    return [
        tuple(t[start : min(start + PART, length)] for t in tensors)
        for start in range(0, length, PART)
    ]


@pytest.mark.parametrize("average", ["f32", "bf16"])
def test_every_element_is_averaged(device: torch.device, average: str) -> None:
    """A narrow average rounds stochastically, within a unit in the last place."""
    count = element_count(device)
    require_memory(device, count * (2 + 2 * (4 if average == "f32" else 2)) + 100 * PART)
    x = torch.empty(count, dtype=torch.bfloat16, device=device)
    fill_random(x, 1)
    ema = fastema.EMA({"w": x}, DECAY, shadow_dtype=average)
    before = ema.shadow["w"].clone()
    fill_random(x, 2)
    ema.update()
    unit = unit_roundoff(average) * (2 if average == "bf16" else 1)
    for old, new, weights in split_into_parts(before, ema.shadow["w"], x):
        wide, target = old.double(), weights.double()
        want = wide + (1 - DECAY) * (target - wide)
        # Three roundings in float32 and one to the average's format.
        bound = unit * want.abs() + 4 * 2.0**-24 * (wide.abs() + target.abs())
        assert not bool(((new.double() - want).abs() > bound).any())


def test_random_bits_depend_on_indices_beyond_32_bits(device: torch.device) -> None:
    count = element_count(device)
    require_memory(device, 6 * count)
    x = torch.empty(count, dtype=torch.bfloat16, device=device)
    fill_random(x, 3)
    ema = fastema.EMA({"w": x}, DECAY, seed=11)
    windows = [slice(at, at + 999) for at in (0, count // 3, count - 13_344, count - 999)]
    before = [host(ema.shadow["w"][window]) for window in windows]
    fill_random(x, 4)
    ema.update()
    for window, old in zip(windows, before, strict=True):
        places = np.arange(window.start, window.stop)
        words = reference.random_words(11, 1, reference.tensor_key("w"), places)
        want = reference.lerp(old, host(x[window]), 1 - DECAY, "bf16", "bf16", words)
        assert (host(ema.shadow["w"][window]) == want).all()
