"""Averages saved on one device and gone on with on another, to the bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema import rules
from fastema.errors import LayoutError

from .given import FLAT, FLOATS, SPACED, Given, assert_all_equal

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

LAYOUTS = {**FLAT, **SPACED}

Make = Callable[[Any], Any]

KINDS: dict[str, tuple[str, Make]] = {
    "f32": ("f32", lambda w: fastema.EMA(w, rules.warmup(0.99))),
    "stochastic": ("bf16", lambda w: fastema.EMA(w, 0.99, seed=5)),
    "two halves": ("bf16", lambda w: fastema.EMA(w, 0.99, shadow_dtype="bf16+16")),
    "several": ("bf16", lambda w: fastema.EMA(w, (0.9, 0.99), shadow_dtype="float32")),
    "windowed": ("f32", lambda w: fastema.SMA(w, 3)),
    "equal": ("f64", fastema.SWA),
}


def run(given: Given, average: Any, steps: range, *others: Any) -> None:
    """Some steps of training."""
    for step in steps:
        given.refresh(step)
        for one in (average, *others):
            one.update()


@pytest.mark.parametrize("kind", KINDS)
def test_from_one_device_to_another(device: torch.device, kind: str) -> None:
    dtype, make = KINDS[kind]
    given = Given(LAYOUTS, FLOATS[dtype], device)
    given.refresh(0)
    there, here = make(given.there), make(given.here)
    run(given, there, range(1, 6))
    here.load_state_dict(there.state_dict())
    run(given, there, range(6, 11), here)
    for one, other in zip(there.shadows, here.shadows, strict=True):
        assert_all_equal(one, other)
    again = make(given.there)
    again.load_state_dict(here.state_dict())
    run(given, there, range(11, 16), here, again)
    for one, other, third in zip(there.shadows, here.shadows, again.shadows, strict=True):
        assert_all_equal(one, other)
        assert_all_equal(one, third)
    assert there.num_updates == here.num_updates == again.num_updates == 15


@pytest.mark.parametrize("kind", KINDS)
def test_through_a_file(device: torch.device, kind: str) -> None:
    """Saved from the device, read on the CPU, and in the middle of an evaluation too."""
    dtype, make = KINDS[kind]
    given = Given(LAYOUTS, FLOATS[dtype], device)
    given.refresh(0)
    average = make(given.there)
    run(given, average, range(1, 6))
    plain, file = average.state_dict(), io.BytesIO()
    with average.swapped(which=0):
        torch.save(average.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    for part in ("shadow", "residual", "ring"):
        for one, other in zip(loaded.get(part, ()), plain.get(part, ()), strict=True):
            assert_all_equal(one, other)
    resumed = make(given.there)
    resumed.load_state_dict(loaded)
    run(given, average, range(6, 10), resumed)
    for one, other in zip(average.shadows, resumed.shadows, strict=True):
        assert_all_equal(one, other)


def test_a_model_moves_and_its_average_with_it(device: torch.device) -> None:
    given = Given(LAYOUTS, torch.bfloat16, device)
    given.refresh(0)
    weights = given.there
    ema = fastema.EMA(weights, 0.99, shadow_dtype="float32")
    twin = fastema.EMA(given.here, 0.99, shadow_dtype="float32")
    run(given, ema, range(1, 4), twin)
    for number, place in enumerate((torch.device("cpu"), device)):
        before = {name: tensor.clone() for name, tensor in ema.shadow.items()}
        for name, tensor in weights.items():
            weights[name] = tensor.detach().to(place, copy=True)
        if device.type == "cuda":
            with pytest.raises(LayoutError, match=r"ema\.to"):
                ema.update()
        ema.to(str(place))
        assert {tensor.device.type for tensor in ema.shadow.values()} == {place.type}
        assert_all_equal(ema.shadow, before)
        run(given, ema, range(4 + 3 * number, 7 + 3 * number), twin)
        assert_all_equal(ema.shadow, twin.shadow)


def test_files_of_safetensors(device: torch.device, tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    given = Given(FLAT, torch.float32, device)
    given.refresh(0)
    power = fastema.PowerEMA(given.there, (0.05, 0.1))
    twin = fastema.PowerEMA(given.here, (0.05, 0.1))
    for step in range(1, 9):
        run(given, power, range(step, step + 1), twin)
        fastema.posthoc.save_snapshot(power, tmp_path / "there")
        fastema.posthoc.save_snapshot(twin, tmp_path / "here")
    one, other = (
        fastema.posthoc.synthesize(tmp_path / side, sigma_rel=0.08).tensors
        for side in ("there", "here")
    )
    assert list(one) == list(other)
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], name)
