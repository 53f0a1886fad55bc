"""Tensors sharded over processes: the DTensors of FSDP2 and tensor parallelism."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import torch
from torch.utils.dlpack import from_dlpack

from fastema.errors import BridgeError
from fastema.layout.spec import TensorSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

_UNDIVIDED = frozenset({torch.Tensor, torch.nn.Parameter})


def is_divided(tensor: Any) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    if type(tensor) in _UNDIVIDED:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # without it there are no DTensors
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, and any other tensor unchanged."""
    if not is_divided(tensor):
        return tensor
    found: torch.Tensor = tensor._local_tensor
    return found


def describe_part(tensor: DTensor, describe: Callable[[torch.Tensor], TensorSpec]) -> TensorSpec:
    """Return the TensorSpec of this rank's part of a DTensor, which must be one block of it.

    ``describe`` is called with the local tensor. Raises a BridgeError for a partial placement, a
    part of several blocks, or a local shape that contradicts the placements.
    """
    # DCP uses this function to place a part in a checkpoint.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    whole = tuple(tensor.shape)
    problem = None
    if any(one.is_partial() for one in placements):
        problem = "is a partial sum that is still pending"
    elif not _is_one_block(mesh, placements):
        problem = "has parts that consist of several blocks"
    if problem is not None:
        raise BridgeError(
            f"a DTensor placed as {placements} {problem}; redistribute it to Shard or Replicate "
            "first"
        )
    found = tensor._local_tensor
    spec = describe(found)
    shape, offset = compute_local_shape_and_global_offset(whole, mesh, placements)
    if tuple(shape) != spec.shape and (spec.size or math.prod(shape)):
        raise BridgeError(
            f"this rank's part of a DTensor of shape {list(whole)} is {list(spec.shape)}, and "
            f"{list(shape)} by its placements {placements}"
        )
    is_part = spec.shape != whole
    return replace(
        spec,
        # The offset of an empty part may lie past the end.
        whole=whole if is_part else None,
        offset=(tuple(offset) if spec.size else (0,) * len(whole)) if is_part else None,
        owner=tensor,
        fingerprint=_fingerprint,
        unwrap=_wrapped,
        division=_DTensorSharding(mesh, placements, whole, tensor.stride()),
    )


def _is_one_block(mesh: Any, placements: tuple[Any, ...]) -> bool:
    """Return whether every rank's part is one block of the whole tensor.

    FSDP on top of tensor parallelism shards a dimension over the later mesh dimension first. With
    both shardings a part is one block; with the strided sharding alone it is several.
    """
    dims = [getattr(one, "dim", None) for one in placements]
    for place, strided in enumerate(placements):
        factor = getattr(strided, "split_factor", 1)
        later = (mesh.size(i) for i in range(place + 1, len(dims)) if dims[i] == dims[place])
        if factor != 1 and math.prod(later) != factor:
            return False
    return True


_wrapped: Final = attrgetter("_local_tensor")


def _fingerprint(tensor: DTensor) -> object:
    found = tensor._local_tensor
    return id(found), found.data_ptr(), found.shape, found.dtype


@dataclass(frozen=True)
class _DTensorSharding:
    """How a DTensor is sharded; see :class:`fastema.layout.spec.Sharding`."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of the ranks that hold the same part."""
        coordinate = self.mesh.get_coordinate()
        return coordinate is not None and not any(
            at for at, one in zip(coordinate, self.placements, strict=True) if one.is_replicate()
        )

    def tensor(self, array: torch.Tensor) -> DTensor:
        """Return a DTensor around this rank's part."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        # Build it as FSDP does: from_local would copy offloaded tensors to the mesh's device.
        # DLPack gives the memory a second storage: the staging of DCP fails on a shared one.
        meta = TensorMeta(torch.Size(self.shape), self.strides, array.dtype)
        spec = DTensorSpec(self.mesh, self.placements, tensor_meta=meta)
        return DTensor(from_dlpack(array.detach()), spec, requires_grad=False)

    def stacked(self, count: int) -> _DTensorSharding:
        """Return the sharding of ``count`` such tensors stacked along a new first axis."""
        sizes = [n * s for n, s in zip(self.shape, self.strides, strict=True)]
        return _DTensorSharding(
            self.mesh,
            tuple(map(_with_axis_before, self.placements)),
            (count, *self.shape),
            (max(sizes, default=1), *self.strides),
        )

    def __str__(self) -> str:
        placed = ", ".join(map(str, self.placements))
        return f"{placed} over {tuple(self.mesh.shape)}"


def _with_axis_before(placement: Any) -> Any:
    """Return the placement for tensors with one more axis in front."""
    if not hasattr(placement, "dim"):
        return placement
    factor = getattr(placement, "split_factor", None)
    options = {} if factor is None else {"split_factor": factor}
    return type(placement)(placement.dim + 1, **options)


def wrap_part(tensor: DTensor, part: torch.Tensor) -> DTensor:
    """Return a DTensor sharded like ``tensor`` around another local part, on any device."""
    placed = tensor.device_mesh, tuple(tensor.placements)
    return _DTensorSharding(*placed, tuple(tensor.shape), tensor.stride()).tensor(part)


def gather(tensor: DTensor) -> torch.Tensor:
    """Return the full tensor of a DTensor on every rank; all ranks must call this."""
    # Send bytes: neither gloo nor NCCL supports 16-bit integers.
    part = local(tensor).detach().contiguous().unsqueeze(-1).view(torch.uint8)
    size, device = tensor.dtype.itemsize, tensor.device_mesh.device_type
    division = _DTensorSharding(
        tensor.device_mesh,
        tuple(tensor.placements),
        (*tensor.shape, size),
        (*(size * stride for stride in tensor.stride()), 1),
    )
    try:
        whole: torch.Tensor = division.tensor(part.to(device)).full_tensor()
    except RuntimeError as error:
        raise BridgeError(
            f"the parts of a DTensor over {tuple(tensor.device_mesh.shape)} ranks cannot be "
            "gathered here; save with torch.distributed.checkpoint to load on other ranks"
        ) from error
    return whole.view(tensor.dtype).squeeze(-1)


def refuse_zero3(tensor: torch.Tensor, *, gathered: bool = True, name: str = "") -> None:
    """Raise a BridgeError for a parameter of DeepSpeed's ZeRO-3, which is empty between steps.

    Pass ``gathered=False`` to accept it while this rank holds all elements.
    """
    if not hasattr(tensor, "ds_id"):
        return
    status = getattr(getattr(tensor, "ds_status", None), "name", "")
    if not gathered and status == "AVAILABLE":
        return
    now = "is gathered now and freed later" if status == "AVAILABLE" else "is empty between steps"
    raise BridgeError(
        f"{name}a parameter of shape {list(getattr(tensor, 'ds_shape', ()))} under DeepSpeed's "
        f"ZeRO-3: its elements lie on several ranks, and the parameter itself {now}. "
        + _ZERO3_ADVICE
    )


_ZERO3_ADVICE: Final = (
    "Train with ZeRO stage 1 or 2, or with FSDP2. Otherwise average this rank's elements, "
    "EMA({name: p.ds_tensor for name, p in model.named_parameters()}): one-dimensional, padded "
    "at the end, and to be updated and saved by rank, not swapped, since a gathered parameter "
    "does not follow. Or average {name: p.data ...} within "
    "deepspeed.zero.GatheredParameters(parameters), which gathers them at each update"
)


def refuse_emptied(names: Sequence[str], total: int) -> None:
    """Raise a BridgeError for float tensors of shape (0,) that ZeRO-3 may have emptied.

    A state dict and ``p.detach()`` do not show that a parameter was partitioned. Its shape alone
    does not either, so that some empty tensors among others are accepted, unless DeepSpeed has
    partitioned parameters in this process. ``total`` counts the floats, empty or not.
    """
    deepspeed = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    partitioned = getattr(getattr(deepspeed, "Init", None), "param_id", 0)  # the next one's number
    if partitioned or len(names) == total:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        known = "has partitioned" if partitioned else "may have partitioned"
        raise BridgeError(
            f"{names[0]!r}{more} of {total} tensors to average: shape [0]. DeepSpeed's ZeRO-3 "
            f"{known} parameters here; between steps they are empty, also in state_dict(). "
            f"{_ZERO3_ADVICE}. If a tensor is empty on purpose, leave it out (policy={{name: "
            "'skip'}})"
        )


def refuse_zero3_model(module: torch.nn.Module) -> None:
    """Refuse a module with parameters of ZeRO-3: a copy of it would hold empty tensors."""
    for name, one in module.named_parameters():
        refuse_zero3(one, name=f"{name}: ")


def refuse_fsdp1(module: torch.nn.Module) -> None:
    """Raise a BridgeError for FSDP1, which shards one flat parameter instead of weights."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(
        isinstance(one, fsdp.FullyShardedDataParallel) for one in module.modules()
    ):
        raise BridgeError(
            "FullyShardedDataParallel (FSDP1) hides which part of a weight this rank has; shard "
            "with torch.distributed.fsdp.fully_shard (FSDP2), whose DTensors record it"
        )


def reshard_modules(modules: Iterable[torch.nn.Module], *, interrupted: bool = False) -> None:
    """Make FSDP2 modules hold their sharded parameters; the next forward pass gathers them again.

    After an evaluation, or with ``reshard_after_forward=False``, modules hold gathered parameters.
    With ``interrupted``, modules whose forward pass has not ended are resharded too: it raised.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in modules:
        if isinstance(module, fsdp.FSDPModule):
            state = module._get_fsdp_state()
            for group in _groups_of(state):
                if getattr(group, "_all_gather_result", None) is not None:
                    group.wait_for_unshard()  # a prefetch that began with the old values
            module.reshard()
            if interrupted and not all(group.is_sharded for group in _groups_of(state)):
                _end_forward(state._state_ctx)


def _groups_of(state: Any) -> list[Any]:
    """Return the parameter groups of an FSDP2 module's state; older torch has a single one."""
    groups: list[Any] | None = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [one for one in (state._fsdp_param_group,) if one is not None]
    return groups


def _end_forward(shared: Any) -> None:
    """Reset all FSDP2 modules of one tree after a forward pass that raised, and reshard them.

    In a forward pass ``reshard()`` keeps the parameters that the backward pass will need. Torch's
    ``reset_iter_state()``, where there is one, also drops gradients that are still accumulated.
    """
    shared.iter_forward_root = None
    for state in shared.all_states:
        getattr(state, "_modules_to_run_forward", set()).clear()
        for one in (state, *_groups_of(state)):
            one._training_state = type(one._training_state).IDLE
        for group in _groups_of(state):
            group._to_sharded()
