"""PyTorch tensors, modules and parameters."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, ClassVar, Final, cast
from weakref import finalize, ref

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastema.bridges.dlpack import exchange_address
from fastema.bridges.names import named, plain_names
from fastema.bridges.torch_other import context_of
from fastema.bridges.torch_parts import (
    describe_part,
    is_divided,
    local,
    refuse_fsdp1,
    reshard_modules,
)
from fastema.bridges.torch_parts import gather as gather
from fastema.bridges.torch_ranks import Ranks
from fastema.errors import BridgeError, DeviceError, DTypeError, FastemaError
from fastema.layout.device_context import DeviceContext
from fastema.layout.dtypes import NAME_OF
from fastema.layout.spec import Attributes, Leaf, Leaves, Opaque, Role, TensorContainer, TensorSpec

_NATIVE: Final[dict[str, torch.dtype]] = {
    code: getattr(torch, name) for code, name in NAME_OF.items() if hasattr(torch, name)
}
_CODES: Final = {native: code for code, native in _NATIVE.items()}


def owns(obj: Any) -> bool:
    """Return whether an object is a torch tensor."""
    return isinstance(obj, torch.Tensor)


def scalar(tensor: torch.Tensor) -> float | Callable[[], float]:
    """Return the number in a tensor of one element; on an accelerator, what reads it later.

    It is copied in the current stream, since a graph or a step may write the tensor again.
    """
    if tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor):
        return float(tensor.item())
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        raise BridgeError("a tensor without data has no value: call this outside of torch.compile")
    kept = tensor.detach().clone()
    return lambda: float(kept.item())


def code(dtype: Any) -> str:
    """Return the code of a torch dtype."""
    if dtype not in _CODES:
        known = ", ".join(map(str, _CODES))
        raise DTypeError(f"torch dtype {dtype} has no kernel; known are {known}")
    return _CODES[dtype]


def native(code: str) -> torch.dtype:
    """Return the torch dtype of a code."""
    if code not in _NATIVE:
        raise DTypeError(f"torch has no dtype for {code}")
    return _NATIVE[code]


def describe(tensor: torch.Tensor) -> TensorSpec:
    """Describe where a tensor, or this rank's part of a DTensor, lies now.

    It must have plain strided memory: sparse and quantized tensors, conjugate views, and those on
    the meta device have none.
    """
    if is_divided(tensor):
        return describe_part(tensor, describe)
    if torch.nn.parameter.is_lazy(tensor):
        raise BridgeError("no shape yet (a lazy module); run the model once before averaging it")
    device, context = _device(tensor.device)
    plain = tensor.layout is torch.strided and device != "meta"
    if not plain or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        raise BridgeError(
            f"a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device} has no plain "
            "memory to average; materialise it first (.to_dense(), .to_empty(device=...), "
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
        raise BridgeError(f"the address of a {spec} is no multiple of its element; pass a clone")
    return spec


@cache
def _device(device: torch.device) -> tuple[str, DeviceContext | None]:
    """Return a device's name, and what drives it."""
    return str(device), context_of(device)


def _within_storage(tensor: torch.Tensor, spec: TensorSpec) -> bool:
    storage = tensor.untyped_storage()
    first, end = spec.span()
    begin = storage.data_ptr()
    return begin <= first and end <= begin + storage.nbytes()


def zeros(length: int, code: str, device: str) -> torch.Tensor:
    """Make a flat tensor; ``"pinned"`` is memory of the host that GPUs read and write directly."""
    if device == "pinned":
        return torch.zeros(length, dtype=native(code), pin_memory=True)
    return torch.zeros(length, dtype=native(code), device=device)


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Make another tensor object of the same memory."""
    return tensor.detach()


def transfer(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return the tensor on a device: itself where it is there already."""
    try:
        # Only a device: to() would take a dtype as well, and give memory of another size.
        return tensor.detach().to(torch.device(device))
    except (AssertionError, RuntimeError, TypeError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise DeviceError(f"torch cannot move a tensor to {device}: {reason}") from error


def view(
    flat: torch.Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> torch.Tensor:
    """Make a tensor within a flat one."""
    return flat.as_strided(shape, strides, offset)


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, and any other tensor as it is."""
    return local(tensor).detach()


def ranks_of(tensors: Iterable[torch.Tensor]) -> Ranks | None:
    """Return the ranks that hold parts of the same DTensors; None where no tensor is one."""
    meshes = [tensor.device_mesh for tensor in tensors if is_divided(tensor)]
    return Ranks(meshes) if meshes else None


def world_of(tensors: Sequence[torch.Tensor]) -> Ranks | None:
    """Return all ranks of the default group; None where there is one, or none was made."""
    return Ranks.of_world()


def link(tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the way between tensors and memory of the host that is as large."""
    from fastema.bridges.torch_link import Link

    return Link(tensors)


def reshard(container: Any) -> None:
    """Make the modules of FSDP2 hold their own parts, where they hold gathered parameters."""
    for one in _modules(container):
        reshard_modules(one.modules())


def notify_write(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd that these tensors were written, as torch's own in-place operations do."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # tensors of inference mode keep no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


class Versions:
    """Version counters of tensors that hold other contents for a while.

    Meanwhile the counters stand where no graph has seen them before, and count writes from there.
    Afterwards they are put back with the contents: a graph made before may go on, one made
    meanwhile raises in its backward pass.
    """

    _next: ClassVar[int] = 2**31
    """The next number to count from: above all that training counts to, and never used twice."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        kept = [t for t in tensors if not t.is_inference()]  # those keep no version
        # A DTensor and its part count apart from each other.
        divided = [t for t in kept if is_divided(t)]
        self._owners = [*kept, *divided]
        self._tensors = (*kept, *map(local, divided))
        self._stepped: set[int] = set()
        self._end_notes: Callable[[], object] = lambda: None
        self._before = self._begun = self._now = self._versions()
        self._written: list[torch.Tensor] = []

    def _versions(self) -> array[int]:
        # A list or a tuple would have an object for each.
        return array("q", (tensor._version for tensor in self._tensors))

    def begin(self) -> None:
        """Count from a number of their own: they hold other contents now."""
        self._before = self._versions()
        self._stepped = set()
        self._record_optimizer_steps()
        self._begun = array("q", [Versions._next]) * len(self._tensors)
        Versions._next += 1
        if not self._set(self._begun):
            self._begun = self._versions()

    def written(self) -> list[torch.Tensor]:
        """Return the tensors written since :meth:`begin`; ask before :meth:`end`."""
        self._now = self._versions()
        self._written = []
        if self._now == self._begun and not self._stepped:
            return []
        counts = zip(self._owners, self._tensors, self._now, self._begun, strict=True)
        found = {
            id(owner): (owner, tensor)
            for owner, tensor, now, begun in counts
            if now != begun or id(owner) in self._stepped
        }
        self._written = [tensor for _, tensor in found.values()]
        return [owner for owner, _ in found.values()]

    def _record_optimizer_steps(self) -> None:
        """Note what optimizers write from now on: with foreach and fused no counter shows it."""
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
        """Count on from where they were before :meth:`begin`: their contents are back.

        ``put_back`` is False where these are in other memory than graphs have kept.
        """
        self._end_notes()
        Versions._next = max(Versions._next, max(self._now, default=0)) + 1
        # A view shares its base's counter, and other parts of the base may have been written.
        shared = any(tensor._is_view() for tensor in self._written)
        self._written = []
        if put_back and not shared:
            self._set(self._before)
        else:
            notify_write(self._tensors)

    def _set(self, versions: array[int]) -> bool:
        """Set all counters, or, where this torch cannot, count as after any write."""
        try:
            # Any sequence will do; a tuple would have an object for each.
            numbers = cast("tuple[int, ...]", versions)
            torch._C._autograd._unsafe_set_version_counter(self._tensors, numbers)
        except (AttributeError, TypeError):  # before torch 2.7
            notify_write(self._tensors)
            return False
        return True


def walk(container: Any) -> Leaves | None:
    """Return the parameters and buffers of a module or a list of modules; None for anything else.

    A parameter that does not require a gradient is ``frozen``; a tied one has every name. A buffer
    that was registered with ``persistent=False`` is marked. Modules in a list are stages of one
    model, and keep their names, which must differ.
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
    for path, name, tensor in zip(paths, plain_names(paths), tensors, strict=True):
        role: Role = "buffer"
        if path in parameters:
            role = "weight" if tensor.requires_grad else "frozen"
        persistent = path not in transient
        try:
            items.append(Leaf(name, named(name, describe, tensor), role, persistent))
        except FastemaError as error:
            # The error itself keeps this call, by its traceback, and with that every tensor.
            opaque.append(Opaque(name, type(error)(*error.args), role, persistent))
    return Leaves(items, describe, held, opaque)


def _modules(container: Any) -> Sequence[torch.nn.Module]:
    """Return a module, or the modules of a list or tuple of them; none for anything else."""
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


def state_of(container: Any) -> dict[str, tuple[str, Any]]:
    """Map the keys of a module's ``state_dict()`` to their names in :func:`walk` and their entries.

    An entry that :func:`walk` does not know is named by its key.
    """
    modules = _modules(container)
    own: dict[str, torch.Tensor] = {}
    for one in modules:
        own |= one.named_parameters(remove_duplicate=False)
        own |= one.named_buffers(remove_duplicate=False)
    plain = dict(zip(own, plain_names(list(own)), strict=True))
    names = {id(tensor): plain[name] for name, tensor in own.items()}
    # A hook may have renamed an entry, or copied it: known by its tensor or else by its key.
    return {
        key: (
            names.get(id(entry), plain.get(key, key)),
            entry.detach() if isinstance(entry, torch.Tensor) else entry,
        )
        for one in modules
        for key, entry in one.state_dict(keep_vars=True).items()
    }


_MEMBERS: Final = ("_parameters", "_buffers", "_modules")
"""Attributes of a module, each a mapping of names."""


def _record_containers(
    container: torch.nn.Module, transient: set[str], held: list[TensorContainer]
) -> None:
    """Add the paths that the module's state leaves out, and the containers of its tensors."""
    seen: set[int] = set()
    for path, module in container.named_modules(remove_duplicate=False):
        out = frozenset(module._non_persistent_buffers_set)
        transient.update(f"{path}.{name}" if path else name for name in out)
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = tuple(name for name in _MEMBERS if name in vars(module))
        # The others are held by what holds them, and are looked at in compiled code.
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
    """The members of a module compiled by TorchScript: no dict, but they have ``values()``."""

    def __init__(self, members: Any) -> None:
        self._members = members

    def __iter__(self) -> Iterator[Any]:
        return iter(self._members.values())
