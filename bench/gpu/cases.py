"""The cases of the GPU benchmarks: which tensors, in which dtypes, most important ones first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from bench.race import shapes
from bench.race.cases import MIXES, Case
from bench.race.flat_module import DTYPES, STD, FlatModule
from bench.race.peers import OURS


@dataclass(frozen=True)
class DeviceCase(Case):
    """A case with, where there are any, buffers; whatever belongs to a batch norm is in float32.

    `entries` names those that take part; all of them where it is empty. ``memory`` and ``hot`` are
    not looked at: memory is counted everywhere, and caches are flushed before every call.
    """

    buffers: Callable[[], shapes.Inventory] = list
    entries: tuple[str, ...] = ()


def small_vit() -> shapes.Inventory:
    """Two tensors and one of a batch norm, in place of a vision transformer and a ResNet-50."""
    return [("block.weight", (33, 17)), ("block.bias", (33,)), ("a.bn1.weight", (5,))]


def small_vit_buffers() -> shapes.Inventory:
    """Buffers of `small_vit`."""
    return [("a.bn1.running_mean", (5,)), ("a.bn1.num_batches_tracked", ())]


_BUDGET_S = 6.0

_ON_LARGE = (
    OURS,
    "fastema.EMA, captured",
    "torch mul_/add_ loop",
    "torch._foreach_lerp_, casts",
    "AveragedModel avg_fn",
    "timm ModelEmaV3",
    "ema_pytorch",
    "diffusers EMAModel",
)
"""Entries of a case, in groups that fit in memory together; each group is set up by itself."""

FULL = [
    *(
        DeviceCase("flat-1B", mix, partial(shapes.flat, 1_000_000_000), 30, budget_s=_BUDGET_S)
        for mix in ("bf16/f32", "f32/f32", "bf16/bf16")
    ),
    *(
        DeviceCase("small-1000", mix, shapes.many_small, 60, budget_s=_BUDGET_S)
        for mix in ("f32/f32", "bf16/f32", "bf16/bf16")
    ),
    DeviceCase("llama-7b", "bf16/f32", shapes.llama, 10, budget_s=_BUDGET_S, entries=_ON_LARGE),
    *(
        DeviceCase("gpt2-small", mix, shapes.gpt2, 60, budget_s=_BUDGET_S)
        for mix in ("bf16/f32", "f32/f32", "bf16/bf16")
    ),
    DeviceCase(
        "vit-batchnorm",
        "bf16/f32",
        shapes.vit_with_resnet50,
        30,
        budget_s=_BUDGET_S,
        buffers=shapes.vit_with_resnet50_buffers,
    ),
]

SMALL = [
    *(DeviceCase("flat-1B", mix, partial(shapes.flat, 10_001), 3) for mix in MIXES),
    *(DeviceCase("small-1000", mix, partial(shapes.many_small, 20), 3) for mix in MIXES[:1]),
    DeviceCase("llama-7b", "bf16/f32", partial(shapes.llama, 1, 16, 24, 50), 3, entries=_ON_LARGE),
    *(DeviceCase("gpt2-small", mix, partial(shapes.gpt2, 1, 16, 50, 8), 3) for mix in MIXES[:1]),
    DeviceCase("vit-batchnorm", "bf16/f32", small_vit, 3, buffers=small_vit_buffers),
]
"""The same names with tiny tensors, for dry runs: what is printed of them has no meaning."""


def _in_batch_norm(name: str) -> bool:
    return ".bn" in name or "downsample.1" in name or "running_" in name


@torch.no_grad()
def fill_(model: nn.Module, seed: int) -> None:
    """Fill parameters and float buffers with normal random numbers; counters with the seed."""
    tensors = [*model.parameters(), *model.buffers()]
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.normal_(0.0, STD, generator=generator)
        else:
            tensor.fill_(seed)


def build(case: DeviceCase, device: torch.device, seed: int = 0) -> FlatModule:
    """Return a module with the case's parameters and buffers, random ones, on a device."""
    with device:
        model = FlatModule(case.inventory(), DTYPES[case.weight_dtype])
        for name, parameter in model.named_parameters():
            if _in_batch_norm(name.replace("__", ".")):
                parameter.data = parameter.data.float()
        for name, shape in case.buffers():
            kind = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
            model.register_buffer(name.replace(".", "__"), torch.empty(shape, dtype=kind))
    fill_(model, seed)
    return model


def traffic(case: DeviceCase, model: nn.Module) -> int:
    """Return the least bytes that an update moves: weights read, averages read and written.

    Buffers are copied: read once, written once.
    """
    average = DTYPES[case.average_dtype].itemsize
    weights = sum(p.numel() * (p.element_size() + 2 * average) for p in model.parameters())
    return weights + sum(2 * b.numel() * b.element_size() for b in model.buffers())


def least_memory(case: DeviceCase) -> int:
    """Return about the bytes that weights and one average take."""
    elements = shapes.total_elements(case.inventory())
    return elements * (DTYPES[case.weight_dtype].itemsize + DTYPES[case.average_dtype].itemsize)
