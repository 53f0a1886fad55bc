"""The average in the model and out again: exact, in place, however the block ends."""

from __future__ import annotations

import pytest
import torch

import fastema
from fastema.errors import StateError

from ..support import reference
from .given import FLAT, FLOATS, SPACED, Given, assert_all_equal, host

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

PAIRS = [
    ("f32", "f32"),
    ("bf16", "bf16"),
    ("f64", "f64"),
    ("bf16", "f32"),
    ("bf16", "bf16+16"),
    ("f16", "f32"),
    ("f32", "bf16"),
    ("f32", "f64"),
]


def averaged(
    device: torch.device, model: str, average: str
) -> tuple[Given, fastema.EMA, fastema.EMA]:
    """Weights and an average of them on the device, and one on the CPU, some updates on."""
    given = Given({**FLAT, **SPACED}, FLOATS[model], device)
    given.refresh(0)
    ema, twin = (fastema.EMA(side, 0.9, shadow_dtype=average) for side in (given.there, given.here))
    for step in (1, 2):
        given.refresh(step)
        ema.update()
        twin.update()
    return given, ema, twin


def bytes_of(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """What tensors hold, to the bit."""
    return {name: host(tensor).tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("model", "average"), PAIRS)
def test_there_and_back(device: torch.device, model: str, average: str) -> None:
    given, ema, twin = averaged(device, model, average)
    weights, shadow = bytes_of(given.there), bytes_of(ema.shadow)
    state = ema.state_dict()
    values = {name: host(tensor) for name, tensor in ema.shadow.items()}
    places = {name: tensor.data_ptr() for name, tensor in given.there.items()}
    for _ in range(2):
        with ema.swapped(), twin.swapped():
            for name, tensor in given.there.items():
                value = values[name]
                if (model, average) == ("bf16", "f32"):
                    want, _ = reference.split(value)  # ties away from zero, so that it comes back
                else:
                    want = reference.cast(value, average.removesuffix("+16"), model)
                assert host(tensor).tobytes() == want.tobytes(), name
            assert_all_equal(given.there, given.here)
            assert bytes_of(ema.shadow) == shadow
            assert {name: t.data_ptr() for name, t in given.there.items()} == places
        assert bytes_of(given.there) == weights
        assert bytes_of(ema.shadow) == shadow
    for part in {"shadow", "residual"} & state.keys():
        assert_all_equal(ema.state_dict()[part][0], state[part][0])
    given.assert_rest_untouched()
    ema.update()
    twin.update()
    assert_all_equal(ema.shadow, twin.shadow)


def test_the_block_raises(device: torch.device) -> None:
    given, ema, _ = averaged(device, "bf16", "f32")
    weights, shadow = bytes_of(given.there), bytes_of(ema.shadow)

    def fail() -> None:
        with ema.swapped():
            assert bytes_of(given.there) != weights
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (bytes_of(given.there), bytes_of(ema.shadow)) == (weights, shadow)


def test_calls_that_the_state_forbids(device: torch.device) -> None:
    given, ema, _ = averaged(device, "f32", "f32")
    before = bytes_of(given.there)
    ema.apply_shadow()
    with pytest.raises(StateError):
        ema.update()
    with pytest.raises(StateError):
        ema.apply_shadow()
    ema.restore()
    with pytest.raises(StateError):
        ema.restore()
    assert bytes_of(given.there) == before


@pytest.mark.parametrize(("model", "average"), [("f32", "f32"), ("bf16", "f32")])
def test_one_of_several_averages(device: torch.device, model: str, average: str) -> None:
    given = Given(FLAT, FLOATS[model], device)
    given.refresh(0)
    ema, twin = (
        fastema.EMA(side, (0.5, 0.9), shadow_dtype=average) for side in (given.there, given.here)
    )
    given.refresh(1)
    ema.update()
    twin.update()
    weights, shadows = bytes_of(given.there), [bytes_of(s) for s in ema.shadows]
    for which in (1, 0):
        with ema.swapped(which=which), twin.swapped(which=which):
            assert_all_equal(given.there, given.here)
        assert bytes_of(given.there) == weights
        assert [bytes_of(s) for s in ema.shadows] == shadows


@pytest.mark.parametrize("nan", [0x7FC1_2345, 0x7F80_0001, 0xFFFF_FFFF])
def test_nan_keeps_its_payload(device: torch.device, nan: int) -> None:
    bits = torch.tensor([nan, 0x3F80_0000, 0x8000_0000, 0x0000_0001], dtype=torch.int64)
    a = bits.to(torch.int32).view(torch.float32).to(device)
    b = bits.flip(0).to(torch.int32).view(torch.float32).to(device)
    want = host(b).tobytes(), host(a).tobytes()
    fastema.Plan([a], [b]).swap_()
    assert (host(a).tobytes(), host(b).tobytes()) == want


def test_copies_into_another_model(device: torch.device) -> None:
    given, ema, twin = averaged(device, "bf16", "f32")
    elsewhere = Given({**FLAT, **SPACED}, torch.bfloat16, device)
    ema.copy_to(elsewhere.there)
    twin.copy_to(elsewhere.here)
    assert_all_equal(elsewhere.there, elsewhere.here)
    elsewhere.assert_rest_untouched()
    assert bytes_of(given.there) != bytes_of(elsewhere.there)
