"""GPUs of AMD, Apple and Intel: PyTorch supports them, fastema has no kernels for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fastema.bridges.torch_cuda import TorchContext
from fastema.layout.device_context import DeviceContext, Substitute
from fastema.layout.group import Pair

__all__ = ["OtherContext", "context_of"]

_NAMES: Final = {"cuda": "ROCm", "mps": "Metal", "xpu": "Intel GPUs"}
"""Names of the backends, other than CUDA, behind PyTorch's device types."""


class OtherContext:
    """A device without kernels; see :class:`fastema.layout.device_context.DeviceContext`.

    PyTorch's own functions do the work on the current stream, so no memory has to be kept for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.index = str(device), device.index or 0
        self.fallback_reason: str | None = (
            f"fastema has no kernels for {_NAMES[device.type]}: PyTorch's own functions average "
            f"the tensors on {device}"
        )

    def stream(self) -> int:
        """Return 0: no kernel is launched."""
        return 0

    def capturing(self) -> bool:
        """Return False: whether PyTorch's functions can be captured is up to PyTorch."""
        return False

    def upload(self, array: NDArray[Any]) -> tuple[torch.Tensor, int]:
        """Copy an array to the device; return the copy and its address."""
        there = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return there, there.data_ptr()

    def download(self, owner: torch.Tensor) -> NDArray[Any]:
        """Return a host copy of an uploaded array."""
        found: NDArray[Any] = owner.cpu().numpy()
        return found

    def write(self, owner: torch.Tensor, array: NDArray[Any]) -> None:
        """Overwrite an uploaded array."""
        owner.copy_(torch.from_numpy(np.ascontiguousarray(array)))

    def defer_reuse(self, owners: Iterable[torch.Tensor]) -> bool:
        """Return True: PyTorch's functions keep their operands alive."""
        return True

    def wait(self) -> None:
        """Do nothing: copies to the host synchronize anyway."""

    def substitute(self, operation: str, pairs: Sequence[Pair]) -> Substitute:
        """Return a function that runs the operation with torch's own functions."""
        from fastema.bridges.torch_foreach import substitute

        return substitute(operation, pairs)


@cache
def context_of(device: torch.device) -> DeviceContext | None:
    """Return the context of a device; None for the host and for unsupported devices."""
    if device.type == "cuda" and torch.version.hip is None:
        return TorchContext(device.index)
    return OtherContext(device) if device.type in _NAMES else None
