"""DLPack in C: its exchange interface, which describes a tensor without a capsule, and capsules."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from functools import cache
from typing import Any, Final, NamedTuple

__all__ = ["Described", "capsule_address", "exchange_address", "read_capsule"]

_HEADER_WORDS: Final = 2
"""Version (two uint32), address of an earlier version's table."""

_DLTENSOR_FROM_OBJECT: Final = _HEADER_WORDS + 3
"""After allocate, managed tensor from object, managed tensor to object."""

_FLAGS: Final = 24
_AFTER_FLAGS: Final = 32
"""Bytes into a versioned managed tensor: after version, context and deleter."""

_READ_ONLY: Final = 1

_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
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


def exchange_address(array: Any) -> int:
    """Return the address of ``dltensor_from_py_object_no_sync`` of an array's class, 0 without one.

    The function has the C signature ``int (PyObject *, DLTensor *)``, needs the GIL, and fills in a
    description that borrows from the array. See the DLPack C interface, version 1.
    """
    array_type: Any = type(array)
    return _address(array_type)


@cache
def _address(array_type: Hashable) -> int:
    capsule = getattr(array_type, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return 0
    table = _pointer(capsule, b"dlpack_exchange_api")
    if ctypes.c_uint32.from_address(table).value != 1:  # the major version
        return 0
    words = (ctypes.c_void_p * (_DLTENSOR_FROM_OBJECT + 1)).from_address(table)
    return words[_DLTENSOR_FROM_OBJECT] or 0


def capsule_address(capsule: Any) -> int:
    """Return the address of the first element of a capsule called ``dltensor``.

    It stays right without the capsule, for as long as the array it was made from is kept.
    """
    tensor = _Tensor.from_address(_pointer(capsule, b"dltensor"))
    return (tensor.data or 0) + int(tensor.byte_offset)


class Described(NamedTuple):
    """A tensor as a capsule describes it; ``dtype`` is (kind of number, bits, lanes)."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: tuple[int, int, int]
    writable: bool


def read_capsule(capsule: Any) -> Described:
    """Describe the tensor of a capsule of either version; the older one is not writable."""
    versioned = _is_valid(capsule, b"dltensor_versioned")
    place = _pointer(capsule, b"dltensor_versioned" if versioned else b"dltensor")
    flags = ctypes.c_uint64.from_address(place + _FLAGS).value if versioned else _READ_ONLY
    tensor = _Tensor.from_address(place + _AFTER_FLAGS if versioned else place)
    kind, bits, *lanes = tensor.dtype
    return Described(
        (tensor.data or 0) + int(tensor.byte_offset),
        _numbers(tensor.shape, tensor.ndim),
        None if tensor.strides is None else _numbers(tensor.strides, tensor.ndim),
        (kind, bits, lanes[0] + 256 * lanes[1]),
        not flags & _READ_ONLY,
    )


def _numbers(address: int | None, count: int) -> tuple[int, ...]:
    return tuple((ctypes.c_int64 * count).from_address(address)) if address and count else ()
