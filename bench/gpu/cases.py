"""The cases of the GPU benchmarks, with tensors and dtypes, in order of importance."""

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
    """A case that may also have buffers. All tensors of batch norms are float32.

    `entries` names the entries that take part; if it is empty, all do. ``memory`` and ``hot`` are
    ignored: memory is always counted, and caches are flushed before every call.
    """

    buffers: Callable[[], shapes.Inventory] = list
    entries: tuple[str, ...] = ()


def small_vit() -> shapes.Inventory:
    """Return three tensors, one of a batch norm, to replace a ViT with a ResNet-50 in dry runs."""
    return [("block.weight", (33, 17)), ("block.bias", (33,)), ("a.bn1.weight", (5,))]


def small_vit_buffers() -> shapes.Inventory:
    """Return the buffers of `small_vit`."""
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
"""Entries that take part in the large case, where setting up each group takes long."""

_ON_TINY = (
    OURS,
    "fastema.Plan.lerp_",
    "fastema.EMA, captured",
    "torch mul_/add_ loop",
    "torch._foreach_lerp_",
    "AveragedModel multi_avg_fn",
)
"""Entries that take part where only the launch counts."""

FULL = [
    *(
        DeviceCase("flat-1B", mix, partial(shapes.flat, 1_000_000_000), 30, budget_s=_BUDGET_S)
        for mix in ("bf16/f32", "f32/f32", "bf16/bf16")
    ),
    *(
        DeviceCase("small-1000", mix, shapes.many_small, 60, budget_s=_BUDGET_S)
        for mix in ("f32/f32", "bf16/f32", "bf16/bf16")
    ),
    DeviceCase("tiny-64", "f32/f32", shapes.tiny, 200, budget_s=_BUDGET_S, entries=_ON_TINY),
    *(
        DeviceCase("gpt2-small", mix, shapes.gpt2, 60, budget_s=_BUDGET_S)
        for mix in ("bf16/f32", "f32/f32", "bf16/bf16")
    ),
]
"""The cases of the targets, and one more of each of their models."""

MORE = [
    DeviceCase("llama-7b", "bf16/f32", shapes.llama, 10, budget_s=_BUDGET_S, entries=_ON_LARGE),
    DeviceCase(
        "vit-batchnorm",
        "bf16/f32",
        shapes.vit_with_resnet50,
        30,
        budget_s=_BUDGET_S,
        buffers=shapes.vit_with_resnet50_buffers,
    ),
]
"""Further cases, which come last."""

SMALL = [
    *(DeviceCase("flat-1B", mix, partial(shapes.flat, 10_001), 3) for mix in MIXES),
    *(DeviceCase("small-1000", mix, partial(shapes.many_small, 20), 3) for mix in MIXES[:1]),
    DeviceCase("tiny-64", "f32/f32", partial(shapes.tiny, 4, 16), 3, entries=_ON_TINY),
    *(DeviceCase("gpt2-small", mix, partial(shapes.gpt2, 1, 16, 50, 8), 3) for mix in MIXES[:1]),
    DeviceCase("llama-7b", "bf16/f32", partial(shapes.llama, 1, 16, 24, 50), 3, entries=_ON_LARGE),
    DeviceCase("vit-batchnorm", "bf16/f32", small_vit, 3, buffers=small_vit_buffers),
]
"""Cases of the same names with tiny tensors, for dry runs; their figures are meaningless."""


def _in_batch_norm(name: str) -> bool:
    return ".bn" in name or "downsample.1" in name or "running_" in name


@torch.no_grad()
def fill_(model: nn.Module, seed: int) -> None:
    """Fill parameters and float buffers with normal random numbers, and counters with the seed."""
    tensors = [*model.parameters(), *model.buffers()]
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.normal_(0.0, STD, generator=generator)
        else:
            tensor.fill_(seed)


def build(case: DeviceCase, device: torch.device, seed: int = 0) -> FlatModule:
    """Return a module on a device with the case's parameters and buffers, randomly filled."""
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
    """Return the fewest bytes that an update moves.

    Weights are read, averages are read and written, and buffers are copied: read and written once.
    """
    average = DTYPES[case.average_dtype].itemsize
    weights = sum(p.numel() * (p.element_size() + 2 * average) for p in model.parameters())
    return weights + sum(2 * b.numel() * b.element_size() for b in model.buffers())


def estimate_memory(case: DeviceCase) -> int:
    """Return the approximate size of the weights and one average in bytes."""
    elements = shapes.total_elements(case.inventory())
    return elements * (DTYPES[case.weight_dtype].itemsize + DTYPES[case.average_dtype].itemsize)
