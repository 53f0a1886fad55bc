"""The cases of the GPU benchmarks: which tensors, in which dtypes, most important ones first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from bench import models
from bench.cases import MIXES, Case
from bench.flatmodule import DTYPES, STD, FlatModule
from bench.peers import OURS


def llama(
    layers: int = 32, width: int = 4_096, hidden: int = 11_008, vocab: int = 32_000
) -> models.Inventory:
    """Parameters of Llama; the defaults are the model of 7 billion.

    ``3 + 9 * layers`` tensors: 291 with 6,738,415,616 elements. Linear layers are
    ``(outputs, inputs)``, as the published checkpoints have them.
    """
    inventory: models.Inventory = [("model.embed_tokens.weight", (vocab, width))]
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for projection in ("q", "k", "v", "o"):
            inventory.append((f"{block}.self_attn.{projection}_proj.weight", (width, width)))
        inventory += [
            (f"{block}.mlp.gate_proj.weight", (hidden, width)),
            (f"{block}.mlp.up_proj.weight", (hidden, width)),
            (f"{block}.mlp.down_proj.weight", (width, hidden)),
            (f"{block}.input_layernorm.weight", (width,)),
            (f"{block}.post_attention_layernorm.weight", (width,)),
        ]
    return [*inventory, ("model.norm.weight", (width,)), ("lm_head.weight", (vocab, width))]


def vit(layers: int = 12, width: int = 768, tokens: int = 197) -> models.Inventory:
    """Parameters of a vision transformer; the defaults are ViT-B/16 at 224 pixels.

    ``8 + 12 * layers`` tensors: 152 with 86,567,656 elements.
    """
    inventory: models.Inventory = [
        ("cls_token", (1, 1, width)),
        ("pos_embed", (1, tokens, width)),
        ("patch_embed.proj.weight", (width, 3, 16, 16)),
        ("patch_embed.proj.bias", (width,)),
    ]
    for layer in range(layers):
        block = f"blocks.{layer}"
        inventory += [
            (f"{block}.norm1.weight", (width,)),
            (f"{block}.norm1.bias", (width,)),
            (f"{block}.attn.qkv.weight", (3 * width, width)),
            (f"{block}.attn.qkv.bias", (3 * width,)),
            (f"{block}.attn.proj.weight", (width, width)),
            (f"{block}.attn.proj.bias", (width,)),
            (f"{block}.norm2.weight", (width,)),
            (f"{block}.norm2.bias", (width,)),
            (f"{block}.mlp.fc1.weight", (4 * width, width)),
            (f"{block}.mlp.fc1.bias", (4 * width,)),
            (f"{block}.mlp.fc2.weight", (width, 4 * width)),
            (f"{block}.mlp.fc2.bias", (width,)),
        ]
    inventory += [("norm.weight", (width,)), ("norm.bias", (width,))]
    return [*inventory, ("head.weight", (1_000, width)), ("head.bias", (1_000,))]


def hybrid(layers: int = 12) -> models.Inventory:
    """Parameters of a vision transformer beside a ResNet-50, in two dtypes and many sizes."""
    return [*vit(layers), *((f"backbone.{name}", shape) for name, shape in models.resnet50())]


def hybrid_buffers() -> models.Inventory:
    """Buffers of :func:`hybrid`: those of its batch norms."""
    return [(f"backbone.{name}", shape) for name, shape in models.resnet50_buffers()]


def small_hybrid() -> models.Inventory:
    """As :func:`hybrid`, small: two tensors of each kind."""
    return [("block.weight", (33, 17)), ("block.bias", (33,)), ("a.bn1.weight", (5,))]


def small_hybrid_buffers() -> models.Inventory:
    """Buffers of :func:`small_hybrid`."""
    return [("a.bn1.running_mean", (5,)), ("a.bn1.num_batches_tracked", ())]


@dataclass(frozen=True)
class DeviceCase(Case):
    """A case with, where there are any, buffers; whatever belongs to a batch norm is in float32.

    `entries` names those that take part; all of them where it is empty. ``memory`` and ``hot`` are
    not looked at: memory is counted everywhere, and caches are flushed before every call.
    """

    buffers: Callable[[], models.Inventory] = list
    entries: tuple[str, ...] = ()


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
"""Entries of a case of which few fit in memory at once: each group is set up anew."""

FULL = [
    *(
        DeviceCase("flat-1B", mix, partial(models.flat, 1_000_000_000), 30, budget_s=_BUDGET_S)
        for mix in ("bf16/f32", "f32/f32", "bf16/bf16")
    ),
    *(
        DeviceCase("small-1000", mix, models.many_small, 60, budget_s=_BUDGET_S)
        for mix in ("f32/f32", "bf16/f32", "bf16/bf16")
    ),
    DeviceCase("llama-7b", "bf16/f32", llama, 10, budget_s=_BUDGET_S, entries=_ON_LARGE),
    *(
        DeviceCase("gpt2-small", mix, models.gpt2, 60, budget_s=_BUDGET_S)
        for mix in ("bf16/f32", "f32/f32", "bf16/bf16")
    ),
    DeviceCase("vit-batchnorm", "bf16/f32", hybrid, 30, budget_s=_BUDGET_S, buffers=hybrid_buffers),
]

SMALL = [
    *(DeviceCase("flat-1B", mix, partial(models.flat, 10_001), 3) for mix in MIXES),
    *(DeviceCase("small-1000", mix, partial(models.many_small, 20), 3) for mix in MIXES[:1]),
    DeviceCase("llama-7b", "bf16/f32", partial(llama, 1, 16, 24, 50), 3, entries=_ON_LARGE),
    *(DeviceCase("gpt2-small", mix, partial(models.gpt2, 1, 16, 50, 8), 3) for mix in MIXES[:1]),
    DeviceCase("vit-batchnorm", "bf16/f32", small_hybrid, 3, buffers=small_hybrid_buffers),
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
    elements = models.total_elements(case.inventory())
    return elements * (DTYPES[case.weight_dtype].itemsize + DTYPES[case.average_dtype].itemsize)
