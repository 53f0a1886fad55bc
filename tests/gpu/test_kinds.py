"""The other averages: windowed, equal, several at once; guards and what is measured beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.errors import NonFiniteError

from ..shadow.stored import exact
from ..support import reference
from .given import FLAT, FLOATS, SPACED, Given, assert_all_equal, host

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

LAYOUTS = {**FLAT, **SPACED}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("f32", {}),
        ("f64", {}),
        ("bf16", {"shadow_dtype": "float32"}),
        ("f32", {"ring_dtype": "bfloat16"}),
        ("f32", {"ring_device": "cpu"}),
        ("bf16", {"update_every": 2, "start_after": 3}),
    ],
)
def test_windowed_mean_is_that_of_the_cpu(
    device: torch.device, model: str, options: dict[str, Any]
) -> None:
    given = Given(LAYOUTS, FLOATS[model], device)
    given.refresh(0)
    sma, twin = (fastema.SMA(side, 4, **options) for side in (given.there, given.here))
    for step in range(1, 15):
        given.refresh(step)
        sma.update()
        twin.update()
        assert_all_equal(sma.shadow, twin.shadow)
    given.assert_rest_untouched()


@pytest.mark.parametrize(
    ("model", "average"), [("f32", "f32"), ("f64", "f64"), ("bf16", "f32"), ("f16", "f32")]
)
def test_windowed_mean_is_the_mean(device: torch.device, model: str, average: str) -> None:
    """Of the widest floats there are, within a unit in the last place."""
    given = Given(LAYOUTS, FLOATS[model], device)
    given.refresh(0)
    sma = fastema.SMA(given.there, 4, shadow_dtype=average)
    history: dict[str, list[np.ndarray]] = {name: [] for name in given.there}
    unit = 2.0**-53 if average == "f64" else 2.0**-24
    for step in range(1, 15):
        given.refresh(step)
        sma.update()
        for name, tensor in given.there.items():
            history[name].append(exact(tensor.cpu()))
            want = reference.windowed_mean(np.stack(history[name]), 4)
            largest = max(float(np.max(np.abs(x), initial=0.0)) for x in history[name][-8:])
            # What the mean may be off, and the sum in the widest floats.
            slack = (32 * unit**2 + 2.0**-60) * largest
            off = np.abs(exact(sma.shadow[name].cpu()) - want)
            assert (off <= 2 * unit * np.abs(want) + slack).all(), name


def test_windowed_mean_goes_on_elsewhere(device: torch.device) -> None:
    """In the middle of filling its ring, and once it is full."""
    for steps in (3, 9):
        given = Given(LAYOUTS, torch.float32, device)
        given.refresh(0)
        sma, twin = fastema.SMA(given.there, 5), fastema.SMA(given.here, 5)
        for step in range(steps):
            given.refresh(step)
            sma.update()
        twin.load_state_dict(sma.state_dict())
        for step in range(steps, steps + 7):
            given.refresh(step)
            sma.update()
            twin.update()
            assert_all_equal(sma.shadow, twin.shadow)


@pytest.mark.parametrize(("model", "average"), [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16")])
def test_several_averages_are_each_as_alone(device: torch.device, model: str, average: str) -> None:
    given = Given(LAYOUTS, FLOATS[model], device)
    given.refresh(0)
    rules = (0.5, fastema.rules.warmup(0.999), 0.9)
    options = {"shadow_dtype": average, "rounding": "nearest"}
    together, twin = (fastema.EMA(side, rules, **options) for side in (given.there, given.here))
    alone = [fastema.EMA(given.there, rule, **options) for rule in rules]
    for step in range(1, 5):
        given.refresh(step)
        for one in (together, twin, *alone):
            one.update()
    for which, one in enumerate(alone):
        assert_all_equal(together.shadows[which], one.shadow)
        assert_all_equal(together.shadows[which], twin.shadows[which])


@pytest.mark.parametrize(
    "make",
    [
        fastema.SWA,
        lambda weights: fastema.SWA(weights, shadow_dtype="float64"),
        lambda weights: fastema.PowerEMA(weights, (0.05, 0.2)),
        lambda weights: fastema.EMA(weights, 0.99, zero_debias=True),
        lambda weights: fastema.EMA(weights, 0.9, update_every=3, start_after=2),
    ],
    ids=["equal", "equal in float64", "power", "debiased", "every third"],
)
def test_other_rules(device: torch.device, make: Any) -> None:
    given = Given(LAYOUTS, torch.float32, device)
    given.refresh(0)
    average, twin = make(given.there), make(given.here)
    for step in range(1, 12):
        given.refresh(step)
        average.update()
        twin.update()
    for one, other in zip(average.shadows, twin.shadows, strict=True):
        assert_all_equal(one, other)
    assert average.report() == twin.report()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model", ["f32", "bf16", "f64"])
def test_guard(device: torch.device, model: str, bad: float) -> None:
    given = Given(LAYOUTS, FLOATS[model], device)
    given.refresh(0)
    skips = fastema.EMA(given.there, 0.9, on_nonfinite="skip")
    raises = fastema.EMA(given.there, 0.9, on_nonfinite="raise")
    twin = fastema.EMA(given.here, 0.9)
    for step in range(1, 8):
        given.refresh(step)
        place = {3: ("chunks", -1), 4: ("everywhere", (2, 3, 1)), 6: ("scalar", ())}.get(step)
        if place is None:
            for one in (skips, raises, twin):
                one.update()
            continue
        name, at = place
        given.there[name][at] = bad
        skips.update()
        with pytest.raises(NonFiniteError, match=name):
            raises.update()
    assert skips.num_skipped == 3
    assert skips.num_updates == raises.num_updates == twin.num_updates == 4
    for one in (skips, raises):
        assert_all_equal(one.shadow, twin.shadow)


@pytest.mark.parametrize(("model", "average"), [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16")])
def test_drift(device: torch.device, model: str, average: str) -> None:
    given = Given(LAYOUTS, FLOATS[model], device)
    given.refresh(0)
    options = {"shadow_dtype": average, "drift": True}
    ema, twin = (fastema.EMA(side, (0.9, 0.5), **options) for side in (given.there, given.here))
    for step in range(1, 4):
        given.refresh(step)
        ema.update()
        twin.update()
    for which, (drift, other) in enumerate(zip(ema.drifts, twin.drifts, strict=True)):
        shadow = {name: exact(t.cpu()) for name, t in ema.shadows[which].items()}
        apart = [exact(x.cpu()) - shadow[name] for name, x in given.there.items()]
        size = np.sqrt(sum(float((one**2).sum()) for one in shadow.values()))
        distance = np.sqrt(sum(float((one**2).sum()) for one in apart))
        # The kernel squares in float32 and adds up in float64.
        assert drift.distance == pytest.approx(distance, rel=1e-6)
        assert drift.relative == pytest.approx(distance / size, rel=1e-6)
        assert drift.distance == pytest.approx(other.distance, rel=1e-6)
        assert drift.still == other.still


def test_measuring_changes_no_bit(device: torch.device) -> None:
    given = Given(LAYOUTS, torch.bfloat16, device)
    given.refresh(0)
    plain, measured = (fastema.EMA(given.there, 0.9, drift=drift) for drift in (False, True))
    for step in range(1, 4):
        given.refresh(step)
        plain.update()
        measured.update()
    assert_all_equal(plain.shadow, measured.shadow)


def test_means_between_two_states(device: torch.device) -> None:
    given = Given(FLAT, torch.float32, device)
    given.refresh(0)
    swa = fastema.SWA(given.there, shadow_dtype="float64")
    rows: dict[str, list[np.ndarray]] = {name: [] for name in given.there}
    early: dict[str, torch.Tensor] = {}
    for step in range(1, 8):
        given.refresh(step)
        swa.update()
        for name, tensor in given.there.items():
            rows[name].append(host(tensor).astype(np.float64))
        if step == 3:
            early = swa.state_dict()["shadow"][0]
    for name, tensor in fastema.mean_between(swa.shadow, 7, early, 3).items():
        np.testing.assert_allclose(host(tensor), np.mean(rows[name][3:], axis=0), 1e-13, 1e-15)
