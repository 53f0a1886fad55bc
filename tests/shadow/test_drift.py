"""How far the weights are from their average, measured while it is updated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fastema

from .stored import exact
from .weights import refresh_

pytestmark = pytest.mark.torch


def reals(tensors: Any, names: list[str]) -> np.ndarray:
    """All elements of some tensors as float64, complex ones in pairs."""
    parts = [tensors[name].detach() for name in names]
    parts = [torch.view_as_real(p) if p.is_complex() else p for p in parts]
    return np.concatenate([exact(part).reshape(-1) for part in parts])


def check(average: Any, weights: Any, before: list[np.ndarray]) -> None:
    names = sorted(average.averaged_names)
    x = reals(weights, names)
    assert len(average.drifts) == len(average.shadows)
    for drift, shadow, old in zip(average.drifts, average.shadows, before, strict=True):
        value = reals(shadow, names)
        distance = math.sqrt(np.square(x - value).sum())
        size = math.sqrt(np.square(value).sum())
        assert drift.distance == pytest.approx(distance, rel=1e-5)
        assert drift.relative == pytest.approx(distance / size, rel=1e-5)
        assert drift.still == pytest.approx((value == old).mean(), abs=1e-12)


def before_of(average: Any) -> list[np.ndarray]:
    return [reals(shadow, sorted(average.averaged_names)) for shadow in average.shadows]


def test_stalls_show() -> None:
    start = torch.randn(5000).bfloat16()
    weights = {"w": start.clone(), "equal": torch.ones(5000)}
    nearest = fastema.EMA(weights, 0.999, rounding="nearest", drift=True)
    random = fastema.EMA(weights, 0.999, drift=True)
    weights["w"].mul_(1.01)
    nearest.update()
    random.update()
    assert nearest.drift.still == 1
    assert 0.5 < random.drift.still < 1
    for one in (nearest, random):
        assert one.drift.distance > 0
    weights["w"].copy_(start)
    again = fastema.EMA(weights, 0.9, drift=True)
    again.update()
    assert again.drift == (0.0, 0.0, 1.0)


def test_of_the_latest_update_that_did_work() -> None:
    weights = {"w": torch.randn(300)}
    ema = fastema.EMA(weights, 0.9, update_every=3, drift=True, on_nonfinite="skip")
    for step in range(1, 4):
        refresh_(weights, step)
        before = before_of(ema)
        ema.update()
    check(ema, weights, before)
    drift = ema.drift
    for value in (5.0, 6.0):
        weights["w"].fill_(value)
        ema.update()
        assert ema.drift == drift
    weights["w"].fill_(torch.nan)
    ema.update()
    assert ema.num_skipped == 1
    assert ema.drift == drift
    with ema.swapped():
        assert ema.drift == drift
    weights["w"] = torch.randn(300)  # elsewhere
    before = before_of(ema)
    ema.update()
    check(ema, weights, before)
