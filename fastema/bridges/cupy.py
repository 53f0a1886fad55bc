"""CuPy arrays: memory of an NVIDIA GPU, worked on in CuPy's current stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from fastema.errors import BridgeError, DeviceError, DTypeError
from fastema.layout.dtypes import NAME_OF, NAMES, dtype
from fastema.layout.group import Pair
from fastema.layout.home import Home, Substitute
from fastema.layout.spec import Leaves, TensorSpec

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
    "zeros",
]


def owns(obj: Any) -> bool:
    """Whether a CuPy array."""
    return isinstance(obj, cupy.ndarray)


def scalar(array: cupy.ndarray) -> Callable[[], float]:
    """Reads the number in an array of one element later; a copy is made in the current stream."""
    kept = array.copy()
    return lambda: float(kept.item())


def code(value: Any) -> str:
    """The code of a CuPy dtype.

    Raises
    ------
    DTypeError
        For one that has no kernel.
    """
    name = np.dtype(value).name
    if name not in NAMES:
        raise DTypeError(f"CuPy dtype {name} has no kernel; known are {', '.join(NAMES)}")
    return NAMES[name]


def native(code: str) -> np.dtype[Any]:
    """The dtype of a code; bfloat16 needs ml_dtypes."""
    try:
        return np.dtype(NAME_OF[code])
    except TypeError:
        raise DTypeError("CuPy has no bfloat16 of its own: import ml_dtypes first") from None


def describe(array: Any) -> TensorSpec:
    """Where an array lies now.

    Raises
    ------
    DTypeError
        For a dtype that has no kernel.
    BridgeError
        If its strides are no multiples of the element.
    """
    kind = dtype(code(array.dtype))
    if any(step % kind.itemsize for step in array.strides):
        raise BridgeError(
            f"strides {array.strides} are no multiples of {kind.itemsize} bytes; pass a copy"
        )
    where = home(array.device.id)
    return TensorSpec(
        address=array.data.ptr,
        shape=array.shape,
        strides=tuple(step // kind.itemsize for step in array.strides),
        dtype=kind.code,
        device=where.device,
        owner=array,
        home=where,
    )


def _index(device: str) -> int:
    """The number of a GPU."""
    kind, _, index = str(device).partition(":")
    if kind != "cuda":
        raise DeviceError(
            f"CuPy arrays are on a GPU, not on {device}; use array.get() for a copy there"
        )
    return int(index or 0)


def zeros(length: int, code: str, device: str) -> Any:
    """A new flat array on a GPU.

    Raises
    ------
    DeviceError
        For any other device.
    """
    with cupy.cuda.Device(_index(device)):
        return cupy.zeros(length, native(code))


def alias(array: Any) -> Any:
    """Another array object of the same memory."""
    return array.view()


def view(flat: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """A tensor within a flat array."""
    steps = tuple(s * flat.itemsize for s in strides)
    return cupy.ndarray(shape, flat.dtype, flat.data + offset * flat.itemsize, steps)


def transfer(array: Any, device: str) -> Any:
    """The array on a GPU: itself where it is there already.

    Raises
    ------
    DeviceError
        For any other device.
    """
    index = _index(device)
    if index == array.device.id:
        return array
    with cupy.cuda.Device(index):
        return cupy.array(array)


def walk(container: Any) -> Leaves | None:
    """CuPy has no containers of its own."""
    return None


class CupyHome:
    """One CUDA device; see :class:`fastema.layout.home.Home`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.device = f"cuda:{index}"

    def _stream(self) -> Any:
        return cupy.cuda.get_current_stream(self.index)

    def stream(self) -> int:
        """Handle of CuPy's current stream of the device."""
        handle: int = self._stream().ptr
        return handle

    def capturing(self) -> bool:
        """Whether that stream is being captured."""
        return bool(self._stream().is_capturing())

    def upload(self, array: NDArray[Any]) -> tuple[Any, int]:
        """A copy of an array in memory of CuPy's pool, and its address."""
        with cupy.cuda.Device(self.index):
            there = cupy.asarray(array)
        self.wait()
        return there, there.data.ptr

    def download(self, owner: Any) -> NDArray[Any]:
        """A copy of an uploaded array, after what is on the device's streams now."""
        self.wait()
        found: NDArray[Any] = owner.get()
        return found

    def write(self, owner: Any, array: NDArray[Any]) -> None:
        """Overwrite an uploaded array, after what is on the device's streams now."""
        self.wait()
        owner.set(np.ascontiguousarray(array))
        self.wait()

    def wait(self) -> None:
        """Wait for all work on the device."""
        cupy.cuda.Device(self.index).synchronize()

    def hold(self, owners: Iterable[Any]) -> bool:
        """Nothing can be noted: CuPy's pool knows only the stream that memory was allocated on."""
        return False

    def substitute(self, operation: str, pairs: Sequence[Pair]) -> Substitute:
        """Not here.

        Raises
        ------
        DTypeError
            Always: CuPy has no functions that do the same.
        """
        raise DTypeError(
            f"{operation} of CuPy arrays needs the kernels: pip install 'fastema[cuda]' "
            "('fastema[cuda12]' for a driver of CUDA 12)"
        )


@cache
def home(index: int) -> Home:
    """The device of a number; the same object every time."""
    return CupyHome(index)
