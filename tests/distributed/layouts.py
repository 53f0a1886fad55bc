"""A model sharded over ranks in the ways that trainers do it."""

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Net(nn.Module):
    """Odd sizes, for uneven and empty shards, a one-element parameter, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 20)
        self.down = nn.Linear(20, 7)
        self.lone = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("bias", torch.linspace(1.0, 2.0, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.relu(self.up(x))) + self.bias
        return self.lone(x.to(self.lone.weight.dtype)) * self.scale


def build_net(dtype: torch.dtype = torch.float32) -> Net:
    """Build the model with the same weights on every rank."""
    torch.manual_seed(5)
    return Net().to(dtype)


SHAPES = {
    "1": (("dp",), (1,)),
    "2": (("dp",), (2,)),
    "3": (("dp",), (3,)),
    "4": (("dp",), (4,)),
    "2x2": (("dp", "tp"), (2, 2)),
}


@cache
def meshes() -> dict[str, DeviceMesh]:
    """Return all meshes. Every rank must create each mesh, even one it does not belong to."""
    return {
        key: DeviceMesh("cpu", torch.arange(prod(sizes)).reshape(sizes), mesh_dim_names=names)
        for key, (names, sizes) in SHAPES.items()
    }


_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def fsdp(model: Net, ranks: int, **options: Any) -> Net:
    over = meshes()[str(ranks)]
    for part in (model.up, model.down):
        fully_shard(part, mesh=over, **options)
    return fully_shard(model, mesh=over, **options)


def tp(model: Net, ranks: int) -> Net:
    return parallelize_module(model, meshes()[str(ranks)], _PLAN)


def fsdp_on_tp(model: Net) -> Net:
    both = meshes()["2x2"]
    parallelize_module(model, both["tp"], _PLAN)
    fully_shard(model.up, mesh=both["dp"])
    return fully_shard(model, mesh=both["dp"])


def hsdp(model: Net) -> Net:
    both = meshes()["2x2"]
    fully_shard(model.up, mesh=both)
    return fully_shard(model, mesh=both)


LAYOUTS: dict[str, Callable[[Net], Net]] = {
    "one": lambda model: model,
    "fsdp 1": lambda model: fsdp(model, 1),
    "fsdp 2": lambda model: fsdp(model, 2),
    "fsdp 3": lambda model: fsdp(model, 3),
    "fsdp 4": lambda model: fsdp(model, 4),
    "unsharded after": lambda model: fsdp(model, 4, reshard_after_forward=False),
    "mixed": lambda model: fsdp(
        model, 4, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    ),
    "offloaded": lambda model: fsdp(model, 4, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "tp 2": lambda model: tp(model, 2),
    "tp 4": lambda model: tp(model, 4),
    "fsdp on tp": fsdp_on_tp,
    "hsdp": hsdp,
}

RANKS = {"one": 1, "fsdp 1": 1, "fsdp 2": 2, "fsdp 3": 3, "tp 2": 2}
"""Number of ranks in a layout; other layouts use all ranks."""


def is_member(layout: str) -> bool:
    """Return whether this rank belongs to a layout; every rank must call this."""
    meshes()
    return dist.get_rank() < RANKS.get(layout, dist.get_world_size())


def build(layout: str, dtype: torch.dtype = torch.float32) -> Net:
    """Build the model in a layout."""
    return LAYOUTS[layout](build_net(dtype))


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Gather the whole tensor on every rank that has a shard of it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def set_weights(model: Net, values: dict[str, torch.Tensor]) -> None:
    """Write whole tensors into a sharded model in place."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            value = values[name].to(tensor.dtype)
            if isinstance(tensor, DTensor):
                value = distribute_tensor(
                    value, tensor.device_mesh, tensor.placements, src_data_rank=None
                )
            tensor.copy_(value)


def weights(step: int) -> dict[str, torch.Tensor]:
    """Draw the whole weights of a step, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    whole = build_net()
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.3
        for name, tensor in (*whole.named_parameters(), *whole.named_buffers())
    }
