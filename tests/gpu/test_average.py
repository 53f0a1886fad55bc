"""The life of an average on a device equals its CPU twin's, to the bit."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.errors import LayoutError, NonFiniteError

from .given import FLAT, FLOATS, LAYOUTS, Twins, assert_all_equal, assert_equal_averages, host, run

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

Make = Callable[..., Any]
WARMUP = fastema.rules.warmup(0.99)
THREE = (0.5, fastema.rules.warmup(0.999), 0.9)

KINDS: list[tuple[str, Make, dict[str, Any]]] = [
    ("f32", fastema.EMA, {"decay": WARMUP}),
    ("f64", fastema.EMA, {"decay": 0.9}),
    ("bf16", fastema.EMA, {"decay": 0.9, "seed": 5}),
    ("bf16", fastema.EMA, {"decay": 0.9, "shadow_dtype": "float32"}),
    ("bf16", fastema.EMA, {"decay": 0.9, "shadow_dtype": "bf16+16"}),
    ("f32", fastema.EMA, {"decay": 0.9, "shadow_dtype": "bf16+16"}),
    ("f16", fastema.EMA, {"decay": 0.9, "shadow_dtype": "float32"}),
    ("f32", fastema.EMA, {"decay": 0.9, "shadow_dtype": "bfloat16"}),
    ("f32", fastema.EMA, {"decay": 0.9, "shadow_dtype": "float64"}),
    ("f32", fastema.EMA, {"decay": THREE}),
    ("bf16", fastema.EMA, {"decay": THREE, "shadow_dtype": "float32"}),
    ("bf16", fastema.EMA, {"decay": THREE, "rounding": "nearest"}),
    ("f32", fastema.EMA, {"decay": 0.99, "zero_debias": True}),
    ("f32", fastema.EMA, {"decay": 0.9, "update_every": 3, "start_after": 2}),
    ("f32", fastema.SMA, {"window": 4}),
    ("f64", fastema.SMA, {"window": 12}),  # not full when it is saved
    ("bf16", fastema.SMA, {"window": 4, "shadow_dtype": "float32"}),
    ("f32", fastema.SMA, {"window": 4, "ring_dtype": "bfloat16"}),
    ("f32", fastema.SMA, {"window": 4, "ring_device": "cpu"}),
    ("bf16", fastema.SMA, {"window": 4, "update_every": 2, "start_after": 3}),
    ("f32", fastema.SWA, {"shadow_dtype": "float64"}),
    ("f32", fastema.PowerEMA, {"sigma_rels": (0.05, 0.2)}),
]


def bytes_of(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Return the raw bytes of tensors, by name."""
    return {name: host(tensor).tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("model", "kind", "options"), KINDS)
def test_updates_swaps_saves_and_resumed_runs_equal_the_cpu(
    device: torch.device, model: str, kind: Make, options: dict[str, Any]
) -> None:
    given = Twins(LAYOUTS, FLOATS[model], device)
    given.refresh(0)
    there, here = (kind(side, **options) for side in (given.there, given.here))
    for step in range(1, 9):
        run(given, [step], there, here)
        assert_equal_averages(there, here)
    for index in range(len(here.shadows)):
        drift, other = (one.drift(which=index) for one in (there, here))
        assert drift == pytest.approx(other, rel=1e-6)  # summed in another order
    places = {name: tensor.data_ptr() for name, tensor in given.there.items()}
    weights, shadows = bytes_of(given.there), [bytes_of(dict(one)) for one in there.shadows]
    file = io.BytesIO()
    for index in reversed(range(len(shadows))):
        with there.swapped(which=index), here.swapped(which=index):
            assert_all_equal(given.there, given.here)
            assert {name: t.data_ptr() for name, t in given.there.items()} == places
            assert [bytes_of(dict(one)) for one in there.shadows] == shadows
            file = io.BytesIO()
            torch.save(there.state_dict(), file)
        assert bytes_of(given.there) == weights
        assert [bytes_of(dict(one)) for one in there.shadows] == shadows
    file.seek(0)
    loaded, state = torch.load(file, map_location="cpu", weights_only=True), there.state_dict()
    for part in ("shadow", "residual", "ring"):
        for one, other in zip(loaded.get(part, ()), state.get(part, ()), strict=True):
            assert_all_equal(one, other)
    resumed = [kind(side, **options) for side in (given.there, given.here)]
    for one in resumed:
        one.load_state_dict(loaded)
    run(given, range(9, 16), there, here, *resumed)
    assert_equal_averages(there, here, *resumed)
    assert there.report() == here.report()
    given.assert_rest_untouched()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model", ["f32", "bf16", "f64"])
def test_guard_skips_or_names_nonfinite_weights(
    device: torch.device, model: str, bad: float
) -> None:
    given = Twins(LAYOUTS, FLOATS[model], device)
    given.refresh(0)
    skips = fastema.EMA(given.there, 0.9, on_nonfinite="skip")
    raises = fastema.EMA(given.there, 0.9, on_nonfinite="raise")
    twin = fastema.EMA(given.here, 0.9)
    places: dict[int, tuple[str, Any]] = {
        3: ("chunks", -1),
        4: ("everywhere", (2, 3, 1)),
        6: ("scalar", ()),
    }
    for step in range(1, 8):
        if step not in places:
            run(given, [step], skips, raises, twin)
            continue
        given.refresh(step)
        name, at = places[step]
        given.there[name][at] = bad
        skips.update()
        with pytest.raises(NonFiniteError, match=name):
            raises.update()
    assert (skips.num_skipped, skips.num_updates) == (3, 4)
    assert_equal_averages(twin, skips, raises)


def test_an_average_moves_with_its_model(device: torch.device) -> None:
    given = Twins(LAYOUTS, torch.bfloat16, device)
    given.refresh(0)
    weights = given.there
    ema, twin = (fastema.EMA(side, 0.99, shadow_dtype="float32") for side in (weights, given.here))
    run(given, range(1, 4), ema, twin)
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
        run(given, range(4 + 3 * number, 7 + 3 * number), ema, twin)
        assert_equal_averages(ema, twin)


def test_snapshots_equal_the_cpu(device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    given = Twins(FLAT, torch.float32, device)
    given.refresh(0)
    averages = {
        name: fastema.PowerEMA(side, (0.05, 0.1))
        for name, side in (("there", given.there), ("here", given.here))
    }
    for step in range(1, 9):
        run(given, [step], *averages.values())
        for name, average in averages.items():
            fastema.posthoc.save_snapshot(average, tmp_path / name)
    one, other = (
        fastema.posthoc.synthesize(tmp_path / name, sigma_rel=0.08).tensors for name in averages
    )
    assert list(one) == list(other)
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], name)
