"""DLPack in C: its exchange interface, which describes a tensor without a capsule, and capsules."""

from __future__ import annotations

import ctypes
from typing import Any, Final

__all__ = ["capsule_address", "exchange_address"]

_HEADER_WORDS: Final = 2
"""Version (two uint32), address of an earlier version's table."""

_DLTENSOR_FROM_OBJECT: Final = _HEADER_WORDS + 3
"""After allocate, managed tensor from object, managed tensor to object."""

_addresses: dict[type[object], int] = {}

_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Tensor(ctypes.Structure):
    """``DLTensor``, with which a ``DLManagedTensor`` begins."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


def exchange_address(array: object) -> int:
    """Address of ``dltensor_from_py_object_no_sync`` of an array's class, 0 where it has none.

    The function has the C signature ``int (PyObject *, DLTensor *)``, needs the GIL, and fills in a
    description that borrows from the array. See the DLPack C interface, version 1.
    """
    kind = type(array)
    if kind not in _addresses:
        _addresses[kind] = _address(kind)
    return _addresses[kind]


def _address(array_type: type[object]) -> int:
    capsule = getattr(array_type, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return 0
    table = _pointer(capsule, b"dlpack_exchange_api")
    major = ctypes.c_uint32.from_address(table).value
    if major != 1:
        return 0
    words = (ctypes.c_void_p * (_DLTENSOR_FROM_OBJECT + 1)).from_address(table)
    return words[_DLTENSOR_FROM_OBJECT] or 0


def capsule_address(capsule: Any) -> int:
    """Address of the first element of what a capsule called ``dltensor`` holds.

    The capsule need not be kept for it, but what it was made from.
    """
    tensor = _Tensor.from_address(_pointer(capsule, b"dltensor"))
    return (tensor.data or 0) + int(tensor.byte_offset)
