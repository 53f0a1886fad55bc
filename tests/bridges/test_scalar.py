"""Numbers of every framework; those of TensorFlow are in test_tensorflow.py."""

from __future__ import annotations

import decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fastema.bridges.registry import scalar
from fastema.errors import BridgeError


@pytest.mark.parametrize(
    "value",
    [
        *(0.625, 3, True, Fraction(5, 8), decimal.Decimal("0.625"), np.float32(0.625)),
        *(np.int8(-3), np.bool_(True), np.array(0.625), np.array([[7]], np.int16)),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_numbers_of_the_host(value: Any) -> None:
    assert scalar(value) == float(np.asarray(value).item())
    assert type(scalar(value)) is float


@pytest.mark.parametrize(
    "value",
    [
        *(
            "1.0",
            None,
            [1.0],
            (1.0,),
            {},
            1j,
            np.ones(2),
            np.ones((0,)),
            np.complex128(1j),
            10**400,
        ),
        *(np.array("1.0"), np.str_("1.0"), np.array(1j), decimal.Decimal("sNaN"), object()),
    ],
)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(BridgeError, match="expected"):
        scalar(value)


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64):
        assert scalar(torch.tensor([5], dtype=dtype)) == 5.0
    loss = torch.tensor(2.0, requires_grad=True) * 1.5
    assert scalar(loss) == 3.0
    with pytest.raises(BridgeError, match=r"torch\.Tensor of shape \(3,\)"):
        scalar(torch.ones(3))
    with pytest.raises(BridgeError, match="without data"):
        scalar(torch.ones((), device="meta"))


def test_torch_tensors_of_an_accelerator_are_copied_and_not_read() -> None:
    torch = pytest.importorskip("torch")
    from fastema.bridges import torch as bridge

    class OfAccelerator(torch.Tensor):
        device = torch.device("cuda")
        read = False

        def item(self) -> float:
            OfAccelerator.read = True
            return float(self.as_subclass(torch.Tensor).item())

    value = torch.tensor(4.0).as_subclass(OfAccelerator)
    later = bridge.scalar(value)
    with torch.no_grad():
        value.fill_(9.0)  # as a captured graph does at its next replay
    assert not OfAccelerator.read
    assert callable(later)
    assert later() == 4.0


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    for dtype in ("float32", "bfloat16", "int32"):
        assert scalar(jax.block_until_ready(jnp.asarray(5, dtype))) == 5.0
    with pytest.raises(BridgeError, match=r"shape \(3,\)"):
        scalar(jnp.ones(3))
    with pytest.raises(BridgeError, match="traced"):
        jax.jit(lambda x: scalar(x))(1.0)
    gone = jnp.ones(())
    gone.delete()
    with pytest.raises(BridgeError, match="deleted"):
        scalar(gone)


def test_jax_arrays_that_are_being_computed_are_not_waited_for() -> None:
    jax = pytest.importorskip("jax")
    from fastema.bridges import jax as bridge

    class Computing:
        def is_deleted(self) -> bool:
            return self.gone

        def is_ready(self) -> bool:
            return False

        def item(self) -> float:
            return 7.0

        gone = False

    assert hasattr(jax.numpy.ones(()), "is_ready")
    array = Computing()
    later = bridge.scalar(array)
    assert callable(later)
    assert later() == 7.0
    array.gone = True
    with pytest.raises(BridgeError, match="before it was read"):
        later()
