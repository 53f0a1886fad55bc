"""CUDA devices as PyTorch sees them: its streams, its memory, its captures."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastema.errors import DeviceError, StateError
from fastema.layout.group import Pair
from fastema.layout.home import Substitute

__all__ = ["TorchHome", "home"]


def _stream_of(index: int) -> int:
    stream: int = torch.cuda.current_stream(index).cuda_stream
    return stream


# The handle without an object around it, as torch's own compiler asks for it: a tenth of the time.
_current = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of)


class TorchHome:
    """One CUDA device; see :class:`fastema.layout.home.Home`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.device = f"cuda:{index}"

    def stream(self) -> int:
        """Handle of torch's current stream of the device."""
        handle: int = _current(self.index)
        return handle

    def capturing(self) -> bool:
        """Whether torch's current stream of the device is being captured.

        Raises
        ------
        DeviceError
            In a process that was forked from one that had used CUDA.
        StateError
            If that of the current device is, and not this one: what is done now is not captured,
            and CUDA allows nothing else meanwhile.
        """
        if torch.cuda._is_in_bad_fork():
            raise DeviceError(
                "torch used CUDA before this process was forked, and it cannot be used in it: "
                "start workers by 'spawn' (multiprocessing.set_start_method('spawn'))"
            )
        found = torch.cuda.is_current_stream_capturing()  # on the current device
        current = torch.cuda.current_device()
        if current == self.index:
            return found
        with torch.cuda.device(self.index):
            captured = torch.cuda.is_current_stream_capturing()
        if found and not captured:
            raise StateError(
                f"a graph is captured on cuda:{current}, and {self.device} has no part in it: "
                f"capture with torch.cuda.device({self.index}) as the current one"
            )
        return captured

    def upload(self, array: NDArray[Any]) -> tuple[torch.Tensor, int]:
        """A copy of an array in memory of torch's allocator, and its address."""
        self._refuse_capture()
        with torch.inference_mode(False):  # it may have to be written outside of that
            there = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return there, there.data_ptr()

    def download(self, owner: torch.Tensor) -> NDArray[Any]:
        """A copy of an uploaded array, after what is on the device's streams now."""
        self.wait()  # whichever stream wrote it last
        found: NDArray[Any] = owner.cpu().numpy()
        return found

    def write(self, owner: torch.Tensor, array: NDArray[Any]) -> None:
        """Overwrite an uploaded array, after what is on the device's streams now."""
        self.wait()
        owner.copy_(torch.from_numpy(np.ascontiguousarray(array)))
        self.wait()

    def _refuse_capture(self) -> None:
        if self.capturing():
            raise StateError(
                f"{self.device}: this needs the host, which is not there while a graph is "
                "captured; do it before or after"
            )

    def wait(self) -> None:
        """Wait for all work on the device.

        Raises
        ------
        StateError
            In a capture.
        """
        self._refuse_capture()
        torch.cuda.synchronize(self.index)

    def hold(self, owners: Iterable[torch.Tensor]) -> bool:
        """Note the current stream with torch's allocator: freed memory waits for it.

        Not so memory of the host, of which the allocator notes only torch's own copies, and memory
        that an allocator does not know: some refuse what comes from another package.
        """
        stream = torch.cuda.current_stream(self.index)
        everything = True
        with warnings.catch_warnings():
            # cudaMallocAsync finds fault with the stream that the memory is of, which is harmless.
            warnings.simplefilter("ignore")
            for owner in owners:
                noted = owner.is_cuda
                try:
                    if noted:
                        owner.detach().record_stream(stream)
                except RuntimeError:
                    noted = False
                everything = everything and noted
        return everything

    def substitute(self, operation: str, pairs: Sequence[Pair]) -> Substitute:
        """The operation in torch's own functions."""
        from fastema.bridges.torch_foreach import substitute

        return substitute(operation, pairs)


@cache
def home(index: int) -> TorchHome:
    """The device of a number; the same object every time."""
    return TorchHome(index)
