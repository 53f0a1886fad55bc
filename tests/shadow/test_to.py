"""``to()`` takes what ``torch.Tensor.to`` takes, and refuses the rest before anything changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.errors import ArgumentError, DeviceError, DTypeError

from .kinds import all_of, unchanged
from .weights import net, refresh_

pytestmark = pytest.mark.torch

TO_FLOAT32: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "dtype": ((torch.float32,), {}),
    "name": (("float32",), {}),
    "numpy dtype": ((np.float32,), {}),
    "device, dtype": (("cpu", torch.float32), {}),
    "None, dtype": ((None, torch.float32), {}),
    "device object, dtype": ((torch.device("cpu"), torch.float32), {"non_blocking": True}),
    "tensor": ((torch.ones(1),), {}),
    "parameter": ((torch.nn.Parameter(torch.ones(2)),), {}),
    "keywords": ((), {"device": "cpu", "dtype": torch.float32}),
}


@pytest.mark.parametrize("stored", ["bf16+16", "bfloat16", "float64"])
@pytest.mark.parametrize("how", TO_FLOAT32)
def test_a_dtype_in_any_place_converts_the_average(how: str, stored: str) -> None:
    """Every spelling converts the values and what is known of them: the run goes on alike."""
    args, kwargs = TO_FLOAT32[how]
    model = net(0, torch.bfloat16)
    average, twin = (fastema.EMA(model, 0.99, shadow_dtype=stored) for _ in range(2))
    for n in range(1, 60):
        refresh_(model, n)
        average.update()
        twin.update()
        if n == 5:
            assert average.to(*args, **kwargs) is average
            twin.to(dtype="float32")
    assert average.shadow["hidden.weight"].dtype == torch.float32
    assert all_of(average) == all_of(twin)


@pytest.mark.parametrize("to", ["cpu", torch.device("cpu"), None])
@pytest.mark.parametrize("stored", ["bf16+16", "bfloat16"])
def test_a_device_alone_keeps_the_dtype(stored: str, to: Any) -> None:
    model = net(0, torch.bfloat16)
    average, twin = (fastema.EMA(model, 0.99, shadow_dtype=stored) for _ in range(2))
    for n in range(1, 9):
        refresh_(model, n)
        average.to(to)
        average.update()
        twin.update()
    assert all_of(average) == all_of(twin)


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "unknown name": (("foo",), {}, DeviceError, "foo"),
    "number": ((3.5,), {}, DeviceError, "3.5"),
    "bool": ((True,), {}, ArgumentError, "non_blocking"),
    "two dtypes": ((torch.float32, torch.float64), {}, ArgumentError, "two values for dtype"),
    "two devices": (("cpu",), {"device": "cpu"}, ArgumentError, "two values for device"),
    "dtype as device": ((), {"device": torch.float32}, DeviceError, "float32"),
    "device as dtype": ((), {"dtype": torch.device("cpu")}, ArgumentError, "dtype="),
    "integer dtype": ((torch.int32,), {}, DTypeError, "i32"),
    "copy": (("cpu",), {"copy": True}, TypeError, "copy"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_anything_else_is_refused_and_changes_nothing(what: str) -> None:
    args, kwargs, error, message = REFUSED[what]
    average = fastema.EMA(net(0, torch.bfloat16), 0.9, shadow_dtype="bf16+16")
    with unchanged({}, average), pytest.raises(error, match=message):
        average.to(*args, **kwargs)
    average.update()
