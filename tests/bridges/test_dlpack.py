"""Arrays of frameworks we do not know, by DLPack, and its exchange functions."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

import fastema
from fastema.bridges import dlpack as bridge
from fastema.bridges.registry import bridge_of, describe
from fastema.errors import BridgeError, DTypeError, LayoutError


class Current:
    """An array of a framework nobody has heard of, which speaks version 1 of the protocol."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


class Old(Current):
    def __dlpack__(self) -> Any:
        return self.array.__dlpack__()


class Copying(Old):
    def __dlpack__(self) -> Any:
        return self.array.copy().__dlpack__()


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


ARRAYS = [
    *(numbers(5, 7).T, numbers(9, 8)[::2, 1::3], numbers(6)[::-1], numbers(), numbers(3, 0)),
    *(np.ones(4, np.float16), np.ones(4, np.complex128), np.ones(3, bool), np.arange(5)),
]


@pytest.mark.parametrize("kind", [Current, Old])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_description_is_that_of_the_array(kind: type[Current], array: np.ndarray) -> None:
    mine, known = describe(kind(array)), describe(array)
    assert bridge_of(kind(array)) is bridge
    assert (mine.shape, mine.dtype, mine.device) == (known.shape, known.dtype, "cpu")
    if array.size:
        assert (mine.address, mine.strides) == (known.address, known.strides)
    assert mine.writable is (kind is Current)


def test_what_cannot_be_used() -> None:
    array = numbers(3)
    with pytest.raises(BridgeError, match="copies"):
        describe(Copying(array))
    with pytest.raises(BridgeError, match="device 8"):
        describe(Current(array, (8, 0)))
    read_only = numbers(3)
    read_only.flags.writeable = False
    with pytest.raises(BridgeError, match="Old"):
        describe(Old(read_only))
    assert not describe(Current(read_only)).writable
    torch = pytest.importorskip("torch")
    with pytest.raises(DTypeError, match="DLPack dtype"):
        describe(Current(torch.zeros(3, dtype=torch.float8_e4m3fn)))


def test_an_average_of_such_arrays() -> None:
    first, second = numbers(6, 5), numbers(3, seed=1)
    before = [first.astype(float), second.astype(float)]
    ema = fastema.EMA({"a": Current(first), "b": [Current(second)]}, 0.75)
    first += 4
    second *= -2
    ema.update()
    expected = [0.75 * b + 0.25 * x for b, x in zip(before, (first, second), strict=True)]
    for name, truth in zip(("a", "b.0"), expected, strict=True):
        np.testing.assert_allclose(ema.shadow[name], truth, rtol=1e-6, atol=1e-6)
    raw, average = first.tobytes(), ema.shadow["a"].tobytes()
    with ema.swapped():
        assert first.tobytes() == average
    assert first.tobytes() == raw
    average_of_old = numbers(6, 5)
    fastema.lerp_([average_of_old], [Old(first)], 1.0)
    assert average_of_old.tobytes() == raw
    with pytest.raises(LayoutError, match="read-only"):
        fastema.lerp_([Old(first)], [average_of_old], 0.5)


# -- exchange functions ----------------------------------------------------------------------------


class DLTensor(ctypes.Structure):
    """As the DLPack header has it."""

    _fields_ = (
        *(("data", ctypes.c_void_p), ("device_type", ctypes.c_int32)),
        *(("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32)),
        *(("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)),
        *(("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64))),
        ("byte_offset", ctypes.c_uint64),
    )


@pytest.mark.torch
def test_the_exchange_function_of_torch_describes_a_tensor() -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(1.0, 61.0).view(3, 4, 5)
    address = bridge.exchange_address(base)
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert address == 0
        pytest.skip("this torch has no DLPack exchange functions")
    assert address == bridge.exchange_address(torch.nn.Parameter(base)) != 0
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
    assert bridge.exchange_address(np.ones(3)) == bridge.exchange_address(3.5) == 0
    new = ctypes.pythonapi.PyCapsule_New
    monkeypatch.setattr(new, "restype", ctypes.py_object)
    monkeypatch.setattr(new, "argtypes", [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p])
    name = b"dlpack_exchange_api"
    tables = [(ctypes.c_uint64 * 8)(major, 0, 11, 12, 13, 14, 15, 16) for major in (1, 2)]
    # After the header come allocate, from object, to object, and the one we use.
    for table, wanted in zip(tables, (14, 0), strict=True):
        capsule = new(ctypes.addressof(table), name, None)
        array_type = type("Array", (), {"__dlpack_c_exchange_api__": capsule})
        assert bridge.exchange_address(array_type()) == wanted
