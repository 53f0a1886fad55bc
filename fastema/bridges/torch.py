"""PyTorch tensors, modules and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastema.bridges.dlpack import exchange_address
from fastema.bridges.names import plain_names
from fastema.errors import BridgeError, DTypeError
from fastema.layout.spec import Leaf, Leaves, Role, TensorSpec

__all__ = [
    "code",
    "describe",
    "empty",
    "exchange",
    "native",
    "owns",
    "transfer",
    "view",
    "walk",
    "written",
]

_NATIVE: Final = {
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
}
_CODES: Final = {native: code for code, native in _NATIVE.items()}


def owns(obj: Any) -> bool:
    """Whether a torch tensor."""
    return isinstance(obj, torch.Tensor)


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
    plain = tensor.layout == torch.strided and tensor.device.type != "meta"
    if not plain or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        raise BridgeError(
            f"a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device} has no plain "
            "memory to average; materialise it first (.to_dense(), .to_empty(device=...), "
            ".resolve_conj())"
        )
    address = 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    if not address and tensor.numel():
        raise BridgeError(
            f"a {type(tensor).__name__} of shape {list(tensor.shape)} has no memory of its own "
            "(a distributed or fake tensor, or freed storage)"
        )
    return TensorSpec(
        address=address,
        shape=tuple(tensor.shape),
        strides=tensor.stride(),
        dtype=code(tensor.dtype),
        device=str(tensor.device),
        owner=tensor,
    )


def exchange(tensor: Any) -> int:
    """Address of the DLPack exchange function of the tensor's class (torch from 2.10)."""
    return exchange_address(tensor)


def empty(length: int, code: str, device: str) -> torch.Tensor:
    """A new flat tensor, uninitialised."""
    return torch.empty(length, dtype=native(code), device=device)


def transfer(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on a device: itself where it is there already."""
    return tensor.detach().to(device)


def view(
    flat: torch.Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> torch.Tensor:
    """A tensor within a flat one."""
    return flat.as_strided(shape, strides, offset)


def _named(name: str, tensor: torch.Tensor) -> TensorSpec:
    if torch.nn.parameter.is_lazy(tensor):
        raise BridgeError(
            f"{name} has no shape yet (a lazy module); run the model once before averaging it"
        )
    try:
        return describe(tensor)
    except (BridgeError, DTypeError) as error:
        raise type(error)(f"{name}: {error}") from None


def written(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd that these tensors were written, as torch's own in-place operations do."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # tensors of inference mode keep no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def walk(container: Any) -> Leaves | None:
    """The parameters and buffers of a module; None for anything else.

    A parameter that does not require a gradient is ``frozen``; tied ones are listed once.
    """
    if not isinstance(container, torch.nn.Module):
        return None
    found: list[tuple[str, torch.Tensor, Role]] = [
        (name, parameter, "weight" if parameter.requires_grad else "frozen")
        for name, parameter in container.named_parameters()
    ]
    found += [(name, buffer, "buffer") for name, buffer in container.named_buffers()]
    plain = plain_names([name for name, _, _ in found])
    items = [
        Leaf(name, _named(name, tensor), role)
        for name, (_, tensor, role) in zip(plain, found, strict=True)
    ]
    held: list[dict[str, Any]] = []
    for module in container.modules():
        held += (module._parameters, module._buffers, module._modules)
    exchanges = {exchange(tensor) for _, tensor, _ in found}
    return Leaves(
        items,
        describe,
        exchange=exchanges.pop() if len(exchanges) == 1 else 0,
        dicts=held,
    )
