"""GPUs that PyTorch drives and our kernels do not: AMD's, Apple's, Intel's."""

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
"""What PyTorch reaches a kind of device by, where it is not CUDA."""


class OtherContext:
    """A device without kernels of ours; see :class:`fastema.layout.device_context.DeviceContext`.

    PyTorch's own functions take their place, on the stream that is current, so nothing has to be
    held for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.index = str(device), device.index or 0
        self.without_kernels: str | None = (
            f"fastema has no kernels for {_NAMES[device.type]}: PyTorch's own functions average "
            f"what is on {device}"
        )

    def stream(self) -> int:
        """Return 0: nothing of ours is launched."""
        return 0

    def capturing(self) -> bool:
        """Return False: what PyTorch's functions do can be captured or not as PyTorch has it."""
        return False

    def upload(self, array: NDArray[Any]) -> tuple[torch.Tensor, int]:
        """Copy an array to the device."""
        there = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return there, there.data_ptr()

    def download(self, owner: torch.Tensor) -> NDArray[Any]:
        """Copy an uploaded array back."""
        found: NDArray[Any] = owner.cpu().numpy()
        return found

    def write(self, owner: torch.Tensor, array: NDArray[Any]) -> None:
        """Overwrite an uploaded array."""
        owner.copy_(torch.from_numpy(np.ascontiguousarray(array)))

    def hold(self, owners: Iterable[torch.Tensor]) -> bool:
        """Return True: PyTorch's functions hold what they work on."""
        return True

    def wait(self) -> None:
        """Do nothing: copies to the host wait by themselves."""

    def substitute(self, operation: str, pairs: Sequence[Pair]) -> Substitute:
        """Return the operation in torch's own functions."""
        from fastema.bridges.torch_foreach import substitute

        return substitute(operation, pairs)


@cache
def context_of(device: torch.device) -> DeviceContext | None:
    """Return what drives a device; None for the host and for devices that are not averaged on."""
    if device.type == "cuda" and torch.version.hip is None:
        return TorchContext(device.index)
    return OtherContext(device) if device.type in _NAMES else None
