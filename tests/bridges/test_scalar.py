"""Numbers of every framework; those of TensorFlow are in test_tensorflow.py."""

from __future__ import annotations

import decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fastema.bridges.registry import scalar
from fastema.errors import BridgeError

NUMBERS = [
    *(0.625, 3, True, Fraction(5, 8), decimal.Decimal("0.625"), np.float32(0.625)),
    *(np.int8(-3), np.bool_(True), np.array(0.625), np.array([[7]], np.int16)),
]
NO_NUMBERS = [
    *("1.0", None, [1.0], {}, 1j, np.ones(2), np.ones((0,)), np.complex128(1j), 10**400),
    *(np.array("1.0"), np.array(1j), decimal.Decimal("sNaN"), object()),
]


def test_numbers_of_the_host() -> None:
    for value in NUMBERS:
        assert scalar(value) == float(np.asarray(value).item())
        assert type(scalar(value)) is float


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(BridgeError, match="expected"):
        scalar(value)


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64):
        assert scalar(torch.tensor([5], dtype=dtype)) == 5.0
    assert scalar(torch.tensor(2.0, requires_grad=True) * 1.5) == 3.0
    with pytest.raises(BridgeError, match=r"torch\.Tensor of shape \(3,\)"):
        scalar(torch.ones(3))
    with pytest.raises(BridgeError, match="without data"):
        scalar(torch.ones((), device="meta"))


def test_torch_tensors_of_an_accelerator_are_copied_and_not_read() -> None:
    torch = pytest.importorskip("torch")

    class OfAccelerator(torch.Tensor):
        device = torch.device("cuda")
        read = False

        def item(self) -> float:
            OfAccelerator.read = True
            return float(self.as_subclass(torch.Tensor).item())

    from fastema.bridges import torch as bridge

    value = torch.tensor(4.0).as_subclass(OfAccelerator)
    later = bridge.scalar(value)
    with torch.no_grad():
        value.fill_(9.0)  # as a captured graph does at its next replay
    assert not OfAccelerator.read
    assert callable(later)
    assert later() == 4.0


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    from fastema.bridges import jax as bridge

    jnp = jax.numpy
    for dtype in ("float32", "bfloat16", "int32"):
        assert scalar(jax.block_until_ready(jnp.asarray(5, dtype))) == 5.0
    gone = jnp.ones(())
    gone.delete()
    for call, message in (
        (lambda: scalar(jnp.ones(3)), r"shape \(3,\)"),
        (lambda: jax.jit(lambda x: scalar(x))(1.0), "traced"),
        (lambda: scalar(gone), "deleted"),
    ):
        with pytest.raises(BridgeError, match=message):
            call()

    class Computing:  # an array that is not waited for
        gone = False

        def is_deleted(self) -> bool:
            return self.gone

        def is_ready(self) -> bool:
            return False

        def item(self) -> float:
            return 7.0

    array = Computing()
    later = bridge.scalar(array)
    assert callable(later)
    assert later() == 7.0
    array.gone = True
    with pytest.raises(BridgeError, match="before it was read"):
        later()
