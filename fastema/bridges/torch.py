"""The bridge to PyTorch tensors, modules and parameters."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, ClassVar, Final, cast
from weakref import finalize, ref

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastema.bridges.dlpack import exchange_address
from fastema.bridges.names import describe_named, plain_names, unwrapped_names
from fastema.bridges.torch_openmp import openmp as openmp
from fastema.bridges.torch_other import context_of
from fastema.bridges.torch_parts import (
    describe_part,
    is_divided,
    local,
    refuse_fsdp1,
    refuse_zero3,
    reshard_modules,
)
from fastema.bridges.torch_parts import gather as gather
from fastema.bridges.torch_parts import refuse_emptied as refuse_emptied
from fastema.bridges.torch_ranks import MeshRanks
from fastema.errors import BridgeError, DeviceError, DTypeError, FastemaError
from fastema.layout.device_context import DeviceContext
from fastema.layout.dtypes import NAME_OF
from fastema.layout.flat import aligned_empty
from fastema.layout.spec import (
    Attributes,
    Leaf,
    Leaves,
    Opaque,
    Role,
    StateEntry,
    TensorContainer,
    TensorSpec,
)

_NATIVE: Final[dict[str, torch.dtype]] = {
    code: getattr(torch, name) for code, name in NAME_OF.items() if hasattr(torch, name)
}
_CODES: Final = {native: code for code, native in _NATIVE.items()}


def owns(obj: Any) -> bool:
    """Return whether an object is a torch tensor."""
    return isinstance(obj, torch.Tensor)


def scalar(tensor: torch.Tensor) -> float | Callable[[], float]:
    """Return the number in a one-element tensor; on an accelerator, a function to read it later.

    The value is copied on the current stream, since a graph or a step may overwrite the tensor.
    """
    if tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor):
        return float(tensor.item())
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        raise BridgeError("a tensor without data has no value: call this outside of torch.compile")
    kept = tensor.detach().clone()
    return lambda: float(kept.item())


def code(dtype: Any) -> str:
    """Return the code of a torch dtype; raise a DTypeError if it has no kernel."""
    if dtype not in _CODES:
        known = ", ".join(map(str, _CODES))
        raise DTypeError(f"torch dtype {dtype} has no kernel; known dtypes: {known}")
    return _CODES[dtype]


def native(code: str) -> torch.dtype:
    """Return the torch dtype of a code; raise a DTypeError if this torch lacks it."""
    if code not in _NATIVE:
        raise DTypeError(f"torch has no dtype for {code}")
    return _NATIVE[code]


def describe(tensor: torch.Tensor) -> TensorSpec:
    """Return the TensorSpec of a tensor, or of this rank's part of a DTensor.

    Raises a BridgeError for tensors without plain strided memory: sparse and quantized tensors,
    conjugate views, lazy parameters, parameters of ZeRO-3, and tensors on the meta device.
    """
    if is_divided(tensor):
        return describe_part(tensor, describe)
    refuse_zero3(tensor)
    if torch.nn.parameter.is_lazy(tensor):
        raise BridgeError("no shape yet (a lazy module); run the model once before averaging it")
    device, context = _device(tensor.device)
    plain = tensor.layout is torch.strided and device != "meta"
    if not plain or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        raise BridgeError(
            f"a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device} has no plain "
            "memory to average; materialize it first (.to_dense(), .to_empty(device=...), "
            ".resolve_conj())"
        )
    address = 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    spec = TensorSpec(
        address,
        tuple(tensor.shape),
        tensor.stride(),
        code(tensor.dtype),
        device,
        owner=tensor,
        exchange=exchange_address(tensor),
        context=context,
    )
    if spec.size and not (address and _within_storage(tensor, spec)):
        raise BridgeError(
            f"a {type(tensor).__module__}.{type(tensor).__qualname__} of shape "
            f"{list(tensor.shape)} has no memory of its own (a fake tensor, freed storage, or a "
            "subclass of Tensor that keeps its values in other tensors); average a copy in a plain "
            "dtype, or leave it out"
        )
    if address % min(spec.kind.itemsize, 8):
        raise BridgeError(f"a {spec} is not aligned to its element size; pass a clone")
    return spec


@cache
def _device(device: torch.device) -> tuple[str, DeviceContext | None]:
    """Return a device's name and its context."""
    return str(device), context_of(device)


def _within_storage(tensor: torch.Tensor, spec: TensorSpec) -> bool:
    storage = tensor.untyped_storage()
    first, end = spec.span()
    begin = storage.data_ptr()
    return begin <= first and end <= begin + storage.nbytes()


def zeros(length: int, code: str, device: str) -> torch.Tensor:
    """Allocate a flat tensor of zeros; ``"pinned"`` is host memory that GPUs access directly."""
    if device == "pinned":
        # Only memory of the host can be pinned, whatever torch.set_default_device() says.
        return torch.zeros(length, dtype=native(code), device="cpu", pin_memory=True)
    dtype = native(code)
    if torch.device(device).type != "cpu":
        return torch.zeros(length, dtype=dtype, device=device)
    memory = aligned_empty([length * dtype.itemsize], np.dtype(np.uint8))
    memory.fill(0)
    return torch.from_numpy(memory).view(dtype)


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return another tensor object that shares the memory."""
    return tensor.detach()


def transfer(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return the tensor on a device, without a copy if it is already there."""
    try:
        # to() also accepts a dtype, which would return memory of another size: pass a device only.
        return tensor.detach().to(torch.device(device))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise DeviceError(
            f"torch cannot move a tensor to {device}: {reason}; expected a device such as 'cpu' or "
            "'cuda:0'"
        ) from error


def view(
    flat: torch.Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> torch.Tensor:
    """Return a view into a flat tensor; offset and strides are in elements."""
    return flat.as_strided(shape, strides, offset)


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, or any other tensor, detached."""
    return local(tensor).detach()


def ranks_of(tensors: Iterable[torch.Tensor]) -> MeshRanks | None:
    """Return the ranks that hold parts of the DTensors among these; None if there are none."""
    meshes = [tensor.device_mesh for tensor in tensors if is_divided(tensor)]
    return MeshRanks(meshes) if meshes else None


def world_of(tensors: Sequence[torch.Tensor]) -> MeshRanks | None:
    """Return all ranks of the default group; None without a group or with one rank only."""
    return MeshRanks.of_world()


def link(tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return a link that copies tensors to and from staging buffers in host memory."""
    from fastema.bridges.torch_link import Link

    return Link(tensors)


def reshard(container: Any, *, interrupted: bool = False) -> None:
    """Make FSDP2 modules hold their own shards again where they hold gathered parameters."""
    for one in _modules(container):
        reshard_modules(one.modules(), interrupted=interrupted)


def notify_write(tensors: Sequence[torch.Tensor]) -> None:
    """Notify autograd that these tensors were written, as torch's in-place operations do."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors have no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


class Versions:
    """Autograd version counters of tensors that hold other contents for a while.

    During that time the counters start from a number that no autograd graph has saved, and count
    writes from there. Afterwards they are restored along with the contents: a graph recorded before
    stays valid, and one recorded in between raises in its backward pass.
    """

    _next: ClassVar[int] = 2**31
    """The next start number: above any count that training reaches, and never used twice."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        kept = [t for t in tensors if not t.is_inference()]  # they have no version
        # A DTensor and its local tensor have separate counters.
        divided = [t for t in kept if is_divided(t)]
        self._owners = [*kept, *divided]
        self._tensors = (*kept, *map(local, divided))
        self._stepped: set[int] = set()
        self._end_notes: Callable[[], object] = lambda: None
        self._saved_versions = self._start_versions = self._end_versions = self._versions()
        self._written: list[torch.Tensor] = []

    def _versions(self) -> array[int]:
        # A list or a tuple would hold one object per number.
        return array("q", (tensor._version for tensor in self._tensors))

    def begin(self) -> None:
        """Start counting from an unused number: the tensors hold other contents from now on."""
        self._saved_versions = self._versions()
        self._stepped = set()
        self._record_optimizer_steps()
        self._start_versions = array("q", [Versions._next]) * len(self._tensors)
        Versions._next += 1
        if not self._set(self._start_versions):
            self._start_versions = self._versions()

    def written(self) -> list[torch.Tensor]:
        """Return the tensors written since :meth:`begin`; call this before :meth:`end`."""
        self._end_versions = self._versions()
        self._written = []
        if self._end_versions == self._start_versions and not self._stepped:
            return []
        counts = zip(
            self._owners, self._tensors, self._end_versions, self._start_versions, strict=True
        )
        found = {
            id(owner): (owner, tensor)
            for owner, tensor, now, begun in counts
            if now != begun or id(owner) in self._stepped
        }
        self._written = [tensor for _, tensor in found.values()]
        return [owner for owner, _ in found.values()]

    def _record_optimizer_steps(self) -> None:
        """Record what optimizers write: their foreach and fused versions advance no counter."""
        reference = ref(self)

        def record(optimizer: Any, *_: Any) -> None:
            versions = reference()
            if versions is not None:
                for group in optimizer.param_groups:
                    written = (id(one) for one in group["params"] if one.grad is not None)
                    versions._stepped.update(written)

        self._end_notes()
        self._end_notes = finalize(self, register_optimizer_step_post_hook(record).remove)

    def end(self, *, put_back: bool) -> None:
        """Restore the counters to before :meth:`begin`: the tensors have their contents back.

        Pass ``put_back=False`` if the contents are in other memory than graphs have saved; the
        counters then advance instead.
        """
        self._end_notes()
        Versions._next = max(Versions._next, max(self._end_versions, default=0)) + 1
        # A view shares its base's counter, and other parts of the base may have been written.
        shared = any(tensor._is_view() for tensor in self._written)
        self._written = []
        if put_back and not shared:
            self._set(self._saved_versions)
        else:
            notify_write(self._tensors)

    def _set(self, versions: array[int]) -> bool:
        """Set all counters and return True; count a write and return False if torch cannot."""
        try:
            # Any sequence works; a tuple would hold one object per number.
            numbers = cast("tuple[int, ...]", versions)
            torch._C._autograd._unsafe_set_version_counter(self._tensors, numbers)
        except (AttributeError, TypeError):  # before torch 2.7
            notify_write(self._tensors)
            return False
        return True


def walk(container: Any) -> Leaves | None:
    """Return the parameters and buffers of a module or a list of modules; None for anything else.

    A parameter that does not require a gradient is ``frozen``. A tied parameter has an entry under
    every name. A buffer registered with ``persistent=False`` is marked. Modules in a list are
    stages of one model and keep their names, which must differ.
    """
    modules = _modules(container)
    if not modules:
        return None
    for module in modules:
        refuse_fsdp1(module)
    parameters = _union(one.named_parameters(remove_duplicate=False) for one in modules)
    buffers = _union(one.named_buffers(remove_duplicate=False) for one in modules)
    transient: set[str] = set()
    held = [TensorContainer(container)] if isinstance(container, list) else []
    for module in modules:
        _record_containers(module, transient, held)
    paths = [*parameters, *buffers]
    tensors = chain(parameters.values(), buffers.values())
    items: list[Leaf] = []
    opaque: list[Opaque] = []
    plain = dict(zip(paths, plain_names(paths, _parallel_paths(modules)), strict=True))
    for (path, name), tensor in zip(plain.items(), tensors, strict=True):
        role: Role = "buffer"
        if path in parameters:
            role = "weight" if tensor.requires_grad else "frozen"
        persistent = path not in transient
        try:
            items.append(Leaf(name, describe_named(name, describe, tensor), role, persistent))
        except FastemaError as error:
            # A new error: the traceback of this one would keep the frame, and so every tensor.
            opaque.append(Opaque(name, type(error)(*error.args), role, persistent))
    listed = [plain[path] for one in modules for path, _ in one.named_parameters()]
    return Leaves(items, describe, held, opaque, parameters=listed)


def _modules(container: Any) -> Sequence[torch.nn.Module]:
    """Return the modules in a module or a list or tuple of modules; () for anything else."""
    if isinstance(container, torch.nn.Module):
        return (container,)
    if isinstance(container, list | tuple) and container:
        return container if all(isinstance(one, torch.nn.Module) for one in container) else ()
    return ()


def _union(parts: Iterable[Iterable[tuple[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, tensor in chain.from_iterable(parts):
        if found.setdefault(name, tensor) is not tensor:
            raise BridgeError(
                f"two modules have a tensor {name!r}; average them separately, or put them into a "
                "torch.nn.ModuleDict"
            )
    return found


_PARALLEL: Final = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


def _parallel_paths(modules: Iterable[torch.nn.Module]) -> set[str]:
    """Return the paths of the data parallel modules."""
    return {
        path
        for one in modules
        for path, module in one.named_modules(remove_duplicate=False)
        if isinstance(module, _PARALLEL)
    }


def state_of(container: Any) -> dict[str, StateEntry]:
    """Return the entries of a module's ``state_dict()`` by key."""
    modules = _modules(container)
    own: dict[str, torch.Tensor] = {}
    for one in modules:
        own |= one.named_parameters(remove_duplicate=False)
        own |= one.named_buffers(remove_duplicate=False)
    parallel = _parallel_paths(modules)
    plain = dict(zip(own, plain_names(list(own), parallel), strict=True))
    names = {id(tensor): plain[name] for name, tensor in own.items()}
    state = {key: entry for one in modules for key, entry in one.state_dict(keep_vars=True).items()}
    # A hook may have renamed or copied an entry: identify it by its tensor, then by its key.
    return {
        key: StateEntry(
            names.get(id(entry), plain.get(key, key)),
            unwrapped,
            entry.detach() if isinstance(entry, torch.Tensor) else entry,
        )
        for (key, entry), unwrapped in zip(
            state.items(), unwrapped_names(list(state), parallel), strict=True
        )
    }


_MEMBERS: Final = ("_parameters", "_buffers", "_modules")
"""Attributes of a module that map names to its members."""


def _record_containers(
    container: torch.nn.Module, transient: set[str], held: list[TensorContainer]
) -> None:
    """Add the paths of non-persistent buffers, and the containers that hold tensors."""
    seen: set[int] = set()
    for path, module in container.named_modules(remove_duplicate=False):
        out = frozenset(module._non_persistent_buffers_set)
        transient.update(f"{path}.{name}" if path else name for name in out)
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = tuple(name for name in _MEMBERS if name in vars(module))
        # Parents keep submodules alive anyway, and compiled code checks plain dicts.
        held.append(
            TensorContainer(Attributes(module) if module is container else vars(module), own)
        )
        for name in _MEMBERS:
            members = getattr(module, name)
            kept = out if name == "_buffers" else frozenset()
            held.append(
                TensorContainer(
                    members if isinstance(members, dict) else _Scripted(members), None, kept
                )
            )


class _Scripted:
    """Members of a TorchScript module, which are not a dict but have ``values()``."""

    def __init__(self, members: Any) -> None:
        self._members = members

    def __iter__(self) -> Iterator[Any]:
        return iter(self._members.values())
