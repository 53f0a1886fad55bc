"""CUDA devices as PyTorch drives them: streams, memory and graph capture."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fastema.bridges.torch_parts import local
from fastema.errors import DeviceError, StateError
from fastema.layout.device_context import Substitute
from fastema.layout.group import Pair

__all__ = ["TorchContext", "allow_captures"]

_RELAXED: Final = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED: calls of this thread do not invalidate captures of others."""


# The raw handle, as torch's own compiler reads it, takes a tenth of the time of a Stream object.
_current = getattr(
    torch._C,
    "_cuda_getCurrentRawStream",
    lambda index: torch.cuda.current_stream(index).cuda_stream,
)


@cache
def _exchange_capture_mode() -> Callable[[Any], int]:
    """Return the driver's function that replaces the capture mode of the calling thread.

    On an AMD GPU it is a function that only reports a failure.
    """
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        exchange: Callable[[Any], int] = library.cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return lambda mode: 1
    return exchange


@contextmanager
def allow_captures() -> Iterator[None]:
    """Let this thread wait for the device while another thread captures a graph.

    In the default mode of a capture, such a wait in any thread invalidates the capture.
    """
    exchange, mode = _exchange_capture_mode(), ctypes.c_int(_RELAXED)
    failed = exchange(ctypes.byref(mode))  # puts the previous mode into `mode`
    try:
        yield
    finally:
        if not failed:
            exchange(ctypes.byref(mode))


# False for memory that torch's allocator did not allocate, such as that of another package.
_is_owned: Callable[[int], bool] = getattr(torch._C, "_has_Standard_Deleter", lambda storage: True)


class TorchContext:
    """One CUDA device in PyTorch; see :class:`fastema.layout.device_context.DeviceContext`."""

    fallback_reason: str | None = None

    def __init__(self, index: int) -> None:
        self.index = index
        self.device = f"cuda:{index}"

    def stream(self) -> int:
        """Return the handle of torch's current stream on the device."""
        handle: int = _current(self.index)
        return handle

    def capturing(self) -> bool:
        """Return whether torch's current stream on the device is being captured.

        Raises a DeviceError in a process that was forked after CUDA had been used, and a StateError
        if only a stream of another device is being captured: CUDA allows no other work then.
        """
        if torch.cuda._is_in_bad_fork():
            raise DeviceError(
                "torch used CUDA before this process was forked, so CUDA does not work in it: "
                "start workers with 'spawn' (multiprocessing.set_start_method('spawn'))"
            )
        found = torch.cuda.is_current_stream_capturing()  # on the current device
        current = torch.cuda.current_device()
        if current == self.index:
            return found
        with torch.cuda.device(self.index):
            captured = torch.cuda.is_current_stream_capturing()
        if found and not captured:
            raise StateError(
                f"a graph is being captured on cuda:{current}, not on {self.device}: "
                f"capture inside of torch.cuda.device({self.index})"
            )
        return captured

    def upload(self, array: NDArray[Any]) -> tuple[torch.Tensor, int]:
        """Copy an array into memory of torch's allocator; return the copy and its address.

        Raises a StateError in a capture.
        """
        self._refuse_capture()
        with torch.inference_mode(False):  # an inference tensor could not be written outside
            there = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return there, there.data_ptr()

    def download(self, owner: torch.Tensor) -> NDArray[Any]:
        """Return a host copy of an uploaded array, after waiting for all streams."""
        self.wait()
        found: NDArray[Any] = owner.cpu().numpy()
        return found

    def write(self, owner: torch.Tensor, array: NDArray[Any]) -> None:
        """Overwrite an uploaded array, after waiting for all streams."""
        self.wait()
        owner.copy_(torch.from_numpy(np.ascontiguousarray(array)))
        self.wait()

    def _refuse_capture(self) -> None:
        if self.capturing():
            raise StateError(
                f"{self.device}: this needs the host, which takes no part while a graph is "
                "captured; do it before or after the capture"
            )

    def wait(self) -> None:
        """Wait for all work on the device; raise a StateError in a capture."""
        self._refuse_capture()
        torch.cuda.synchronize(self.index)

    def defer_reuse(self, owners: Iterable[torch.Tensor]) -> bool:
        """Record the current stream with torch's allocator, which then frees memory only after it.

        Return False if some memory cannot be recorded: host memory, and memory from another
        package, which some allocators refuse and others silently ignore.
        """
        stream = torch.cuda.current_stream(self.index)
        everything = True
        with warnings.catch_warnings():
            # cudaMallocAsync warns about the stream that allocated the memory, which is harmless.
            warnings.simplefilter("ignore")
            for owner in map(local, owners):
                if not (owner.is_cuda and _is_owned(owner.untyped_storage()._cdata)):
                    everything = False
                    continue
                try:
                    owner.detach().record_stream(stream)
                except RuntimeError:
                    everything = False
        return everything

    def substitute(self, operation: str, pairs: Sequence[Pair]) -> Substitute:
        """Return a function that runs the operation with torch's own functions."""
        from fastema.bridges.torch_foreach import substitute

        return substitute(operation, pairs)
