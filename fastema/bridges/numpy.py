"""The bridge to NumPy arrays."""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastema.bridges.names import code_of
from fastema.errors import BridgeError, DTypeError
from fastema.layout.dtypes import DTYPES, NAME_OF
from fastema.layout.flat import aligned_empty
from fastema.layout.spec import TensorSpec


def owns(obj: Any) -> bool:
    """Return whether an object is a NumPy array."""
    return isinstance(obj, np.ndarray)


def scalar(array: NDArray[Any]) -> float:
    """Return the number in a one-element array, NaN if masked; raise a TypeError if not real."""
    if array.dtype.kind in "cmMOSUT":
        raise TypeError(f"dtype {array.dtype}")
    masked = isinstance(array, np.ma.MaskedArray) and bool(array.mask.any())
    return math.nan if masked else float(array.item())


def code(dtype: Any) -> str:
    """Return the code of a NumPy dtype, which must be in native byte order."""
    return _code(np.dtype(dtype))


@cache  # NumPy builds dtype.name at each access: a third of the time of describe()
def _code(dtype: np.dtype[Any]) -> str:
    return code_of("NumPy", dtype.name if dtype.isnative else repr(dtype))


def native(code: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a code; raise a DTypeError for bfloat16 without ml_dtypes."""
    if code == "bf16":
        if "ml_dtypes" not in sys.modules:
            raise DTypeError("NumPy has no bfloat16 of its own: import ml_dtypes first")
        bfloat16: np.dtype[Any] = np.dtype(sys.modules["ml_dtypes"].bfloat16)
        return bfloat16
    return np.dtype(NAME_OF[code])


def describe(array: NDArray[Any]) -> TensorSpec:
    """Return the TensorSpec of an array; address and strides must be multiples of the itemsize."""
    kind = DTYPES[code(array.dtype)]
    interface, flags = array.__array_interface__, array.flags
    itemsize, strides = kind.itemsize, array.strides
    if not flags.aligned or any(step % itemsize for step in strides):
        raise BridgeError(
            f"address or strides {strides} are not multiples of {itemsize} bytes; "
            "pass a copy (np.array(...))"
        )
    return TensorSpec(
        address=interface["data"][0],
        shape=array.shape,
        strides=tuple([step // itemsize for step in strides]),
        dtype=kind.code,
        device="cpu",
        writable=flags.writeable,
        owner=array,
        fingerprint=_fingerprint,
    )


def _fingerprint(array: NDArray[Any]) -> object:
    address = array.__array_interface__["data"]
    return address, array.shape, array.strides, array.dtype


def zeros(length: int, code: str, device: str) -> NDArray[Any]:
    """Allocate a flat array of zeros."""
    flat: NDArray[Any] = aligned_empty([length], np.dtype(native(code)))
    flat.fill(0)
    return flat


def transfer(array: NDArray[Any], device: str) -> NDArray[Any]:
    """Return the array unchanged; raise a BridgeError for any device but the CPU."""
    if str(device) != "cpu":
        raise BridgeError(f"NumPy arrays are on the CPU, not on {device}")
    return array


def alias(array: NDArray[Any]) -> NDArray[Any]:
    """Return another array object that shares the memory."""
    return array.view()


def view(
    flat: NDArray[Any], offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[Any]:
    """Return a view into a flat array; offset and strides are in elements."""
    steps = tuple(s * flat.itemsize for s in strides)
    return np.ndarray(shape, flat.dtype, flat, offset * flat.itemsize, steps)
