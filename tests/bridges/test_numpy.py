from __future__ import annotations

import numpy as np
import pytest

from fastema.bridges import numpy as bridge
from fastema.errors import BridgeError, DTypeError
from fastema.layout.dtypes import NAMES

from ..support.arrays import numbers

CODES = [code for code in NAMES.values() if code != "bf16"]


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


def test_unaligned_arrays_are_refused() -> None:
    # The first element lies between two places where a kernel may read one.
    array = np.frombuffer(bytearray(41), np.uint8)[1:].view(np.float32)
    with pytest.raises(BridgeError):
        bridge.describe(array)


def test_aligned_complex_numbers_at_odd_steps_are_refused() -> None:
    array = np.ndarray((3,), np.complex128, np.zeros(9), strides=(24,))
    assert array.flags.aligned  # each half is
    with pytest.raises(BridgeError, match="multiples of 16"):
        bridge.describe(array)
