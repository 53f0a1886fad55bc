"""PyTorch tensors, modules and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastema.bridges import torch_cuda
from fastema.bridges.dlpack import exchange_address
from fastema.bridges.names import named, plain_names
from fastema.errors import BridgeError, DeviceError, DTypeError, FastemaError
from fastema.layout.home import Home
from fastema.layout.spec import Leaf, Leaves, Opaque, Role, TensorSpec

__all__ = [
    "alias",
    "code",
    "describe",
    "native",
    "owns",
    "scalar",
    "transfer",
    "view",
    "walk",
    "written",
    "zeros",
]

_NATIVE: Final[dict[str, torch.dtype]] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "c64": torch.complex64,
    "c128": torch.complex128,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
    "bool": torch.bool,
    # from torch 2.3
    **{f"u{n}": getattr(torch, f"uint{n}") for n in (16, 32, 64) if hasattr(torch, f"uint{n}")},
}
_CODES: Final = {native: code for code, native in _NATIVE.items()}


def owns(obj: Any) -> bool:
    """Whether a torch tensor."""
    return isinstance(obj, torch.Tensor)


def scalar(tensor: torch.Tensor) -> float | Callable[[], float]:
    """The number in a tensor of one element; on an accelerator, what reads it later.

    A copy is made in the current stream, since what a graph or a step writes to is written again.
    """
    if tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor):
        return float(tensor.item())
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        raise BridgeError("a tensor without data has no value: call this outside of torch.compile")
    kept = tensor.detach().clone()
    return lambda: float(kept.item())


def code(dtype: Any) -> str:
    """The code of a torch dtype.

    Raises
    ------
    DTypeError
        For one that has no kernel.
    """
    try:
        return _CODES[dtype]
    except KeyError:
        known = ", ".join(str(one) for one in _CODES)
        raise DTypeError(f"torch dtype {dtype} has no kernel; known are {known}") from None


def native(code: str) -> torch.dtype:
    """The torch dtype of a code."""
    try:
        return _NATIVE[code]
    except KeyError:
        raise DTypeError(f"torch has no dtype for {code}") from None


def describe(tensor: torch.Tensor) -> TensorSpec:
    """Where a tensor lies now.

    Raises
    ------
    DTypeError
        For a dtype that has no kernel.
    BridgeError
        For a tensor without plain strided memory (sparse, quantized, meta, conjugate view).
    """
    if torch.nn.parameter.is_lazy(tensor):
        raise BridgeError("no shape yet (a lazy module); run the model once before averaging it")
    plain = tensor.layout == torch.strided and tensor.device.type != "meta"
    if not plain or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        raise BridgeError(
            f"a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device} has no plain "
            "memory to average; materialise it first (.to_dense(), .to_empty(device=...), "
            ".resolve_conj())"
        )
    address = 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    spec = TensorSpec(
        address=address,
        shape=tuple(tensor.shape),
        strides=tensor.stride(),
        dtype=code(tensor.dtype),
        device=str(tensor.device),
        owner=tensor,
        exchange=exchange_address(tensor),
        home=_home(tensor.device),
    )
    if spec.size and not (address and _within_storage(tensor, spec)):
        raise BridgeError(
            f"a {type(tensor).__name__} of shape {list(tensor.shape)} has no memory of its own "
            "(a distributed or fake tensor, or freed storage)"
        )
    if address % min(spec.kind.itemsize, 8):
        raise BridgeError(f"the address of a {spec} is no multiple of its element; pass a clone")
    return spec


def _home(device: torch.device) -> Home | None:
    if device.type != "cuda":
        return None
    return torch_cuda.home(device.index)


def _within_storage(tensor: torch.Tensor, spec: TensorSpec) -> bool:
    storage = tensor.untyped_storage()
    first, end = spec.span()
    return storage.data_ptr() <= first and end <= storage.data_ptr() + storage.nbytes()


def zeros(length: int, code: str, device: str) -> torch.Tensor:
    """A new flat tensor; ``"pinned"`` is memory of the host that GPUs read and write directly."""
    if device == "pinned":
        return torch.zeros(length, dtype=native(code), pin_memory=True)
    return torch.zeros(length, dtype=native(code), device=device)


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor object of the same memory."""
    return tensor.detach()


def transfer(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on a device: itself where it is there already.

    Raises
    ------
    DeviceError
        If torch cannot use the device.
    """
    try:
        return tensor.detach().to(device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise DeviceError(f"torch cannot move a tensor to {device}: {reason}") from error


def view(
    flat: torch.Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> torch.Tensor:
    """A tensor within a flat one."""
    return flat.as_strided(shape, strides, offset)


def written(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd that these tensors were written, as torch's own in-place operations do."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # tensors of inference mode keep no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def walk(container: Any) -> Leaves | None:
    """The parameters and buffers of a module; None for anything else.

    A parameter that does not require a gradient is ``frozen``; a tied one has every name.
    """
    if not isinstance(container, torch.nn.Module):
        return None
    found: list[tuple[str, torch.Tensor, Role]] = [
        (name, parameter, "weight" if parameter.requires_grad else "frozen")
        for name, parameter in container.named_parameters(remove_duplicate=False)
    ]
    buffers = container.named_buffers(remove_duplicate=False)
    found += [(name, buffer, "buffer") for name, buffer in buffers]
    plain = plain_names([name for name, _, _ in found])
    items: list[Leaf] = []
    opaque: list[Opaque] = []
    for name, (_, tensor, role) in zip(plain, found, strict=True):
        try:
            items.append(Leaf(name, named(name, describe, tensor), role))
        except FastemaError as error:
            opaque.append(Opaque(name, error, role))
    held: list[Any] = []
    for module in container.modules():
        members = (module._parameters, module._buffers, module._modules)
        held += (one if isinstance(one, dict) else _Scripted(one) for one in members)
    return Leaves(items, describe, held, opaque)


class _Scripted:
    """What a module compiled by TorchScript holds, which is no dict but has ``values()``."""

    def __init__(self, members: Any) -> None:
        self._members = members

    def __iter__(self) -> Iterator[Any]:
        return iter(self._members.values())
