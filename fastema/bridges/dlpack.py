"""DLPack: host arrays of any other framework, and the C exchange interface."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Hashable
from functools import cache
from typing import Any, Final

from fastema.errors import BridgeError, DTypeError
from fastema.layout.flat import row_major
from fastema.layout.spec import TensorSpec

MEMORY: Final = "numpy"
"""The bridge whose arrays hold averages of these arrays."""

_CPU: Final = 1
"""DLPack's device type of host memory."""

_CODES: Final = {
    **{(0, bits): f"i{bits}" for bits in (8, 16, 32, 64)},
    **{(1, bits): f"u{bits}" for bits in (8, 16, 32, 64)},
    **{(2, bits): f"f{bits}" for bits in (16, 32, 64)},
    (4, 16): "bf16",
    **{(5, bits): f"c{bits}" for bits in (64, 128)},
    (6, 8): "bool",
}
"""Dtype codes by DLPack's type code and number of bits."""

_HEADER_WORDS: Final = 2
"""The version (two uint32) and the address of an earlier version's table."""

_DLTENSOR_FROM_OBJECT: Final = _HEADER_WORDS + 3
"""Index in the table: after allocate, managed tensor from object, managed tensor to object."""

_FLAGS: Final = 24
_AFTER_FLAGS: Final = 32
"""Byte offsets in a versioned managed tensor: the flags follow version, context and deleter."""

_READ_ONLY: Final = 1

_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Tensor(ctypes.Structure):
    """``DLTensor``, the first field of a ``DLManagedTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("kind", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )

    @property
    def address(self) -> int:
        address: int = (self.data or 0) + self.byte_offset
        return address

    def numbers(self, address: int | None) -> tuple[int, ...]:
        """Return the array of ``ndim`` integers (shape or strides) at an address; () for NULL."""
        axes = self.ndim if address else 0
        return tuple((ctypes.c_int64 * axes).from_address(address or 0)) if axes else ()


def exchange_address(array: Any) -> int:
    """Return the address of ``dltensor_from_py_object_no_sync`` for an array's class; 0 if none.

    The function has the C signature ``int (PyObject *, DLTensor *)``, needs the GIL, and fills in a
    ``DLTensor`` that borrows from the array. See the DLPack C interface, version 1.
    """
    array_type: Any = type(array)
    return _exchange_address(array_type)


@cache
def _exchange_address(array_type: Hashable) -> int:
    capsule = getattr(array_type, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return 0
    table = _pointer(capsule, b"dlpack_exchange_api")
    if ctypes.c_uint32.from_address(table).value != 1:  # the major version
        return 0
    words = (ctypes.c_void_p * (_DLTENSOR_FROM_OBJECT + 1)).from_address(table)
    return words[_DLTENSOR_FROM_OBJECT] or 0


def capsule_address(capsule: Any) -> int:
    """Return the address of the first element of the tensor in a ``dltensor`` capsule.

    The address outlives the capsule: it is valid while the exported array lives.
    """
    return _Tensor.from_address(_pointer(capsule, b"dltensor")).address


def owns(obj: Any) -> bool:
    """Return whether an object supports DLPack export."""
    return hasattr(type(obj), "__dlpack__") and hasattr(type(obj), "__dlpack_device__")


def _export_capsule(array: Any) -> tuple[Any, _Tensor, bool]:
    """Return a capsule of an array, the tensor in it, and whether the tensor may be written."""
    capsule = None
    # Before version 1 the protocol takes no arguments and does not report write access.
    with contextlib.suppress(TypeError):
        capsule = array.__dlpack__(max_version=(1, 0), copy=False)
    if capsule is None:
        capsule = array.__dlpack__()
    if not _is_valid(capsule, b"dltensor_versioned"):
        return capsule, _Tensor.from_address(_pointer(capsule, b"dltensor")), False
    place = _pointer(capsule, b"dltensor_versioned")
    flags = ctypes.c_uint64.from_address(place + _FLAGS).value
    return capsule, _Tensor.from_address(place + _AFTER_FLAGS), not flags & _READ_ONLY


def describe(array: Any) -> TensorSpec:
    """Return the TensorSpec of an array, which must be on the host and export no copy."""
    device, _ = array.__dlpack_device__()
    name = type(array).__name__
    if device != _CPU:
        raise BridgeError(f"a {name} on DLPack device {device}: only host memory can be read")
    try:
        first, found, writable = _export_capsule(array)
        second, again, _ = _export_capsule(array)
    except BufferError as error:
        raise BridgeError(f"this {name} does not export its memory: {error}") from None
    if found.address != again.address:
        raise BridgeError(f"a {name} exports copies of its memory; pass an array that does not")
    kind = found.kind, found.bits, found.lanes
    if found.lanes != 1 or kind[:2] not in _CODES:
        raise DTypeError(f"DLPack dtype {kind} has no kernel; known dtypes: {[*_CODES]}")
    shape = found.numbers(found.shape)
    spec = TensorSpec(
        address=found.address,
        shape=shape,
        strides=row_major(shape) if found.strides is None else found.numbers(found.strides),
        dtype=_CODES[kind[:2]],
        device="cpu",
        writable=writable,
        owner=array,
    )
    del first, second  # kept until here: the tensors read above lie in their memory
    return spec
