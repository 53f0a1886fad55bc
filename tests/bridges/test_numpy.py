from __future__ import annotations

import numpy as np
import pytest

from fastema.bridges import numpy as bridge
from fastema.errors import BridgeError, DTypeError
from fastema.layout.dtypes import DTYPES, NAMES

from ..support.arrays import numbers

CODES = [code for code in NAMES.values() if code != "bf16"]


@pytest.mark.parametrize("code", CODES)
def test_codes_and_dtypes_go_both_ways(code: str) -> None:
    native = bridge.native(code)
    assert bridge.code(native) == code
    assert native.itemsize == DTYPES[code].itemsize


@pytest.mark.parametrize("alias", [int, float, complex, bool, np.longlong, np.intc, np.uintp, "f4"])
def test_other_names_of_the_same(alias: object) -> None:
    code = bridge.code(alias)
    assert bridge.native(code) == np.dtype(alias)


@pytest.mark.parametrize("dtype", [">f4", ">i8", "O", "S3", "U2", "M8[s]", "V4", np.longdouble])
def test_dtypes_without_kernels(dtype: object) -> None:
    with pytest.raises(DTypeError, match="float32"):
        bridge.code(dtype)


def test_bfloat16_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert bridge.code(ml_dtypes.bfloat16) == "bf16"
    assert bridge.native("bf16") == np.dtype(ml_dtypes.bfloat16)
    array = numbers(30, "bf16", 1).view(ml_dtypes.bfloat16)
    assert bridge.describe(array).dtype == "bf16"


def test_bfloat16_needs_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "ml_dtypes", raising=False)
    with pytest.raises(DTypeError, match="ml_dtypes"):
        bridge.native("bf16")


def strides(array: np.ndarray) -> tuple[int, ...]:
    return tuple(step // array.itemsize for step in array.strides)


BASE = np.arange(1.0, 121.0, dtype=np.float32).reshape(4, 5, 6)


@pytest.mark.parametrize(
    "array",
    [
        BASE,
        BASE.T,
        BASE[1:, ::2, -1],
        BASE[::-1, :, ::-2],
        BASE[0, 0, 0:0],
        np.array(3.5),
        np.broadcast_to(BASE[0, 0], (3, 6)),
        np.ones(7, bool),
        np.ones((2, 3), np.complex128)[:, 1],
    ],
    ids=["plain", "transposed", "slice", "backwards", "empty", "0-dim", "expanded", "bool", "c128"],
)
def test_description_of_where_an_array_lies(array: np.ndarray) -> None:
    spec = bridge.describe(array)
    assert spec.address == array.ctypes.data
    assert (spec.shape, spec.strides) == (array.shape, strides(array))
    assert (spec.dtype, spec.device) == (bridge.code(array.dtype), "cpu")
    assert spec.writable == array.flags.writeable
    assert spec.owner is array


@pytest.mark.parametrize("code", CODES)
def test_new_arrays_and_views(code: str) -> None:
    flat = bridge.zeros(40, code, "cpu")
    flat[:] = numbers(40, code, 1)
    assert bridge.owns(flat)
    view = bridge.view(flat, 3, (4, 5), (1, 4))
    assert np.shares_memory(view, flat)
    np.testing.assert_array_equal(view, flat[3:23].reshape(5, 4).T)
    assert bridge.describe(view).address == flat.ctypes.data + 3 * flat.itemsize


def test_unaligned_arrays_are_refused() -> None:
    # The first element lies between two places where a kernel may read one.
    array = np.frombuffer(bytearray(41), np.uint8)[1:].view(np.float32)
    with pytest.raises(BridgeError):
        bridge.describe(array)


def test_elements_that_lie_between_others_are_refused() -> None:
    records = np.ones(5, [("a", np.float32), ("b", np.uint8)])
    with pytest.raises(BridgeError, match="multiples of 4"):
        bridge.describe(records["a"])


def test_aligned_complex_numbers_at_odd_steps_are_refused() -> None:
    array = np.ndarray((3,), np.complex128, np.zeros(9), strides=(24,))
    assert array.flags.aligned  # each half is
    with pytest.raises(BridgeError, match="multiples of 16"):
        bridge.describe(array)


def test_arrays_know_one_device() -> None:
    assert bridge.transfer(BASE, "cpu") is BASE
    with pytest.raises(BridgeError, match="cuda:0"):
        bridge.transfer(BASE, "cuda:0")


def test_what_belongs_to_the_bridge() -> None:
    assert bridge.owns(np.ones(2))
    assert bridge.owns(np.ones(2).view(np.recarray))
    for other in (1.5, [1.0], np.float32(1.0), memoryview(b"ab")):
        assert not bridge.owns(other)
    assert bridge.describe(np.ones(2)).exchange == 0
