"""The bridge to CuPy arrays, on an NVIDIA GPU and CuPy's current stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Final

import cupy
import numpy as np
from numpy.typing import NDArray

from fastema.bridges.names import code_of
from fastema.errors import BridgeError, DeviceError, DTypeError, StateError
from fastema.layout.device_context import Substitute
from fastema.layout.dtypes import NAME_OF, dtype
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec


def owns(obj: Any) -> bool:
    """Return whether an object is a CuPy array."""
    return isinstance(obj, cupy.ndarray)


def scalar(array: cupy.ndarray) -> Callable[[], float]:
    """Copy a one-element array on the current stream; return a function that reads the number."""
    kept = array.copy()
    return lambda: float(kept.item())


def code(value: Any) -> str:
    """Return the code of a CuPy dtype."""
    return code_of("CuPy", np.dtype(value).name)


def native(code: str) -> np.dtype[Any]:
    """Return the dtype of a code; raise a DTypeError for bfloat16 without ml_dtypes."""
    try:
        return np.dtype(NAME_OF[code])
    except TypeError:
        raise DTypeError("CuPy has no bfloat16 of its own: import ml_dtypes first") from None


def describe(array: Any) -> TensorSpec:
    """Return the TensorSpec of an array; its strides must be multiples of the itemsize."""
    kind = dtype(code(array.dtype))
    if any(step % kind.itemsize for step in array.strides):
        raise BridgeError(
            f"strides {array.strides} are not multiples of {kind.itemsize} bytes; pass a copy"
        )
    where = context(array.device.id)
    return TensorSpec(
        address=array.data.ptr,
        shape=array.shape,
        strides=tuple(step // kind.itemsize for step in array.strides),
        dtype=kind.code,
        device=where.device,
        owner=array,
        context=where,
    )


def _index(device: str) -> int:
    """Return the index in a name such as ``"cuda:0"``; raise a DeviceError for other devices."""
    kind, _, index = str(device).partition(":")
    if kind != "cuda":
        raise DeviceError(
            f"CuPy arrays are on a GPU, not on {device}; use array.get() for a copy there"
        )
    return int(index or 0)


def zeros(length: int, code: str, device: str) -> Any:
    """Allocate a flat array of zeros on a GPU."""
    with cupy.cuda.Device(_index(device)):
        return cupy.zeros(length, native(code))


def alias(array: Any) -> Any:
    """Return another array object that shares the memory."""
    return array.view()


def view(flat: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """Return a view into a flat array; offset and strides are in elements."""
    steps = tuple(s * flat.itemsize for s in strides)
    return cupy.ndarray(shape, flat.dtype, flat.data + offset * flat.itemsize, steps)


def transfer(array: Any, device: str) -> Any:
    """Return the array on a GPU, without a copy if it is already there."""
    index = _index(device)
    if index == array.device.id:
        return array
    with cupy.cuda.Device(index):
        return cupy.array(array)


class CupyContext:
    """One CUDA device in CuPy; see :class:`fastema.layout.device_context.DeviceContext`."""

    fallback_reason: str | None = None

    def __init__(self, index: int) -> None:
        self.index = index
        self.device = f"cuda:{index}"

    def stream(self) -> int:
        """Return the handle of CuPy's current stream on the device."""
        handle: int = cupy.cuda.get_current_stream(self.index).ptr
        return handle

    def capturing(self) -> bool:
        """Return whether CuPy's current stream on the device is being captured."""
        return bool(cupy.cuda.get_current_stream(self.index).is_capturing())

    def upload(self, array: NDArray[Any]) -> tuple[Any, int]:
        """Copy an array into memory of CuPy's pool; return the copy and its address.

        Raises a StateError in a capture.
        """
        self._refuse_capture()
        with cupy.cuda.Device(self.index):
            there = cupy.asarray(array)
        self.wait()
        return there, there.data.ptr

    def download(self, owner: Any) -> NDArray[Any]:
        """Return a host copy of an uploaded array, after waiting for the device."""
        self.wait()
        found: NDArray[Any] = owner.get()
        return found

    def write(self, owner: Any, array: NDArray[Any]) -> None:
        """Overwrite an uploaded array, after waiting for the device."""
        self.wait()
        owner.set(np.ascontiguousarray(array))
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
        cupy.cuda.Device(self.index).synchronize()

    def defer_reuse(self, owners: Iterable[Any]) -> bool:
        """Return False: CuPy's pool knows only the stream that memory was allocated on."""
        return False

    def substitute(self, operation: str, pairs: Sequence[Pair]) -> Substitute:
        """Raise a DTypeError: CuPy has no functions to replace the kernels."""
        raise DTypeError(
            f"{operation} of CuPy arrays needs the kernels: pip install 'fastema[cuda]' "
            "('fastema[cuda12]' for a CUDA 12 driver)"
        )


context: Final = cache(CupyContext)
"""Return the context of a device index, always the same object."""
