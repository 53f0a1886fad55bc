"""Dtypes of averages: explicit, default, and converted."""

from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.errors import ArgumentError, DeviceError, DTypeError

from ..support.states import nested
from .kinds import assert_unchanged, build_three, full_state
from .truth import Loop, arithmetic_of
from .weights import FLOATS, bits, net, refresh_, train_

pytestmark = pytest.mark.torch

COMPLEX = {"c64": torch.complex64, "c128": torch.complex128}
REAL_PART = {"c64": "f32", "c128": "f64"}
SHAPES = [(), (1,), (63,), (64,), (130,), (7, 11), (2, 3, 5), (0, 4)]
NARROW = {"bf16": torch.bfloat16, "f16": torch.float16}
DECAY, UPDATES = 0.9, 60


def real(tensor: torch.Tensor) -> np.ndarray:
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return parts.detach().double().numpy()


KEPT = [(w, s, r) for w in FLOATS for s in FLOATS for r in (None, "nearest")]
KEPT += [(w, s, None) for w in COMPLEX for s in COMPLEX]


@pytest.mark.parametrize(("weights", "stored", "rounding"), KEPT)
def test_average_equals_a_float64_loop(weights: str, stored: str, rounding: str | None) -> None:
    dtypes, code = {**FLOATS, **COMPLEX}, REAL_PART.get(stored, stored)
    params = [torch.empty(shape, dtype=dtypes[weights]) for shape in SHAPES]
    refresh_(params, 0)
    ema = fastema.EMA(params, DECAY, shadow_dtype=dtypes[stored], rounding=rounding)
    arithmetic = arithmetic_of(REAL_PART.get(weights, weights), code)
    random = code in NARROW and rounding != "nearest"
    loops = [Loop(real(p), code, arithmetic, random) for p in params]
    for n in range(1, UPDATES + 1):
        refresh_(params, n)
        ema.update()
        for loop, p in zip(loops, params, strict=True):
            loop.step(real(p), 1 - DECAY)
    assert ema.num_updates == UPDATES
    for name, loop in zip(ema.shadow, loops, strict=True):
        assert ema.shadow[name].dtype == dtypes[stored]
        loop.check(real(ema.shadow[name]), name)


def test_only_16_bit_averages_round_randomly_by_default() -> None:
    def bits_of(dtype: torch.dtype, **options: object) -> torch.Tensor:
        x = [torch.ones(500)]
        ema = fastema.EMA(x, 0.9, shadow_dtype=dtype, **options)
        refresh_(x, 1)
        ema.update()
        return bits(ema.shadow["0"])

    for dtype in FLOATS.values():
        default, nearest = bits_of(dtype), bits_of(dtype, rounding="nearest")
        assert torch.equal(default, bits_of(dtype, rounding="stochastic"))
        assert torch.equal(default, nearest) == (dtype.itemsize > 2)
        assert torch.equal(default, bits_of(dtype, seed=7)) == (dtype.itemsize > 2)
        assert torch.equal(nearest, bits_of(dtype, rounding="nearest", seed=7))


CHANGES = [("float32", "bf16+16"), ("bf16+16", "float64"), ("bf16+16", "bfloat16")]
CHANGES += [("float64", "bf16+16"), ("bfloat16", "bf16+16"), ("bf16+16", "bf16+16")]


@pytest.mark.parametrize(("old", "new"), CHANGES)
@pytest.mark.parametrize("build", [fastema.EMA, build_three], ids=["EMA", "three"])
def test_conversion_to_and_from_halves_is_exact(build: object, old: str, new: str) -> None:
    """Both halves are converted together, and training continues in the new dtype."""
    model = net()
    average = build(model, shadow_dtype=old)
    train_(model, range(1, 6), average)

    def exact(which: int) -> dict[str, torch.Tensor]:
        target = net(3, torch.float64)
        average.copy_to(target, which=which)
        return {name: p.detach() for name, p in target.named_parameters()}

    before = [exact(which) for which in range(len(average.shadows))]
    average.to(dtype=new)
    kept = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(new, torch.float32)
    for which, old_values in enumerate(before):
        for name, value in exact(which).items():
            assert torch.equal(value, old_values[name].to(kept).double())
    assert ("residual" in nested(average.state_dict())) == (new == "bf16+16")
    state = average.state_dict()
    twin = build(model, shadow_dtype=new)
    twin.load_state_dict(state)
    refresh_(model, 9)
    average.update()
    twin.update()
    assert full_state(average) == full_state(twin)


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
def test_to_accepts_every_spelling_of_a_dtype(how: str, stored: str) -> None:
    """Every spelling converts values and state, so that training continues identically."""
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
    assert full_state(average) == full_state(twin)


def test_to_stores_averages_in_two_halves_by_place_or_by_keyword() -> None:
    average, twin = (fastema.EMA(net(0), 0.99) for _ in range(2))
    assert average.to("bf16+16") is average
    twin.to(dtype="bf16+16")
    assert full_state(average) == full_state(twin)
    assert average.shadow["hidden.weight"].dtype == torch.bfloat16  # the upper halves


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
def test_invalid_arguments_of_to_are_refused_and_change_nothing(what: str) -> None:
    args, kwargs, error, message = REFUSED[what]
    average = fastema.EMA(net(0, torch.bfloat16), 0.9, shadow_dtype="bf16+16")
    with assert_unchanged({}, average), pytest.raises(error, match=message):
        average.to(*args, **kwargs)
    average.update()
