from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from fastema.bridges.dlpack import exchange_address


def test_what_has_no_exchange_function() -> None:
    assert exchange_address(np.ones(3)) == 0
    assert exchange_address(3.5) == 0


class DLTensor(ctypes.Structure):
    """As the DLPack header has it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@pytest.mark.torch
def test_the_exchange_function_of_torch_describes_a_tensor() -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(1.0, 61.0).view(3, 4, 5)
    parameter = torch.nn.Parameter(base)
    address = exchange_address(base)
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert address == 0
        pytest.skip("this torch has no DLPack exchange functions")
    assert address == exchange_address(parameter) != 0
    describe: Any = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(address)
    for tensor, code in ((base[1:, ::2].permute(1, 0, 2), 2), (torch.ones(3).bfloat16(), 4)):
        found = DLTensor()
        assert describe(tensor, ctypes.addressof(found)) == 0
        assert found.data + found.byte_offset == tensor.data_ptr()
        assert (found.device_type, found.device_id) == (1, 0)
        assert (found.code, found.bits) == (code, 8 * tensor.element_size())
        assert tuple(found.shape[: found.ndim]) == tuple(tensor.shape)
        assert tuple(found.strides[: found.ndim]) == tensor.stride()


def test_another_major_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    new = ctypes.pythonapi.PyCapsule_New
    monkeypatch.setattr(new, "restype", ctypes.py_object)
    monkeypatch.setattr(new, "argtypes", [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p])
    name = b"dlpack_exchange_api"
    tables = []
    for major in (1, 2):
        table = (ctypes.c_uint64 * 8)(major, 0, 11, 12, 13, 14, 15, 16)
        tables.append(table)
        capsule = new(ctypes.addressof(table), name, None)
        array_type = type("Array", (), {"__dlpack_c_exchange_api__": capsule})
        # After the header come allocate, from object, to object, and the one we use.
        assert exchange_address(array_type()) == (14 if major == 1 else 0)
