from __future__ import annotations

import sys

import numpy as np
import pytest

from fastema.bridges import numpy as bridge
from fastema.errors import BridgeError, DTypeError

from ..support.arrays import numbers


def test_dtypes_without_kernels() -> None:
    for dtype in (">f4", ">i8", "O", "S3", "U2", "M8[s]", "V4", np.longdouble):
        with pytest.raises(DTypeError, match="float32"):
            bridge.code(dtype)


def test_bfloat16_is_that_of_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert bridge.native("bf16") == np.dtype(ml_dtypes.bfloat16)
    array = numbers(30, "bf16", 1).view(ml_dtypes.bfloat16)
    assert bridge.describe(array).dtype == bridge.code(ml_dtypes.bfloat16) == "bf16"
    monkeypatch.delitem(sys.modules, "ml_dtypes")
    with pytest.raises(DTypeError, match="ml_dtypes"):
        bridge.native("bf16")


BASE = np.arange(1.0, 121.0, dtype=np.float32).reshape(4, 5, 6)
ARRAYS = {
    "transposed": BASE.T,
    "slice": BASE[1:, ::2, -1],
    "backwards": BASE[::-1, :, ::-2],
    "empty": BASE[0, 0, 0:0],
    "0-dim": np.array(3.5),
    "expanded": np.broadcast_to(BASE[0, 0], (3, 6)),
    "bool": np.ones(7, bool),
    "c128": np.ones((2, 3), np.complex128)[:, 1],
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_description_of_where_an_array_lies(array: np.ndarray) -> None:
    spec = bridge.describe(array)
    assert spec.address == array.ctypes.data
    assert spec.shape == array.shape
    assert spec.strides == tuple(step // array.itemsize for step in array.strides)
    assert (spec.dtype, spec.device) == (bridge.code(array.dtype), "cpu")
    assert spec.writable == array.flags.writeable
    assert spec.owner is array


def test_elements_where_no_kernel_may_read_one_are_refused() -> None:
    with pytest.raises(BridgeError):
        bridge.describe(np.frombuffer(bytearray(41), np.uint8)[1:].view(np.float32))
    odd_steps = np.ndarray((3,), np.complex128, np.zeros(9), strides=(24,))
    assert odd_steps.flags.aligned  # each half is
    with pytest.raises(BridgeError, match="multiples of 16"):
        bridge.describe(odd_steps)
