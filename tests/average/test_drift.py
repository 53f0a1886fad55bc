"""The distance between an average and the weights, against float64."""

from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.average import drift
from fastema.errors import ArgumentError, StateError

pytestmark = pytest.mark.torch


def weights_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return tensors of odd sizes and orders of axes, around 3."""
    wide = torch.randn(70, 31, dtype=torch.float64).mul_(0.1).add_(3).to(dtype)
    return {
        "wide": wide,
        "transposed": wide.clone().t(),
        "every second": wide.clone()[:, ::2],
        "one": wide[:1, 0].clone(),
        "empty": wide[:0].clone(),
    }


def change(weights: dict[str, torch.Tensor]) -> None:
    for one in weights.values():
        one.add_(torch.randn(one.shape).to(one.dtype), alpha=0.5)


def expected_drift(weights: dict[str, torch.Tensor], average: Any) -> tuple[float, float]:
    sides = [
        np.concatenate([one[name].double().numpy().ravel() for name in weights])
        for one in (weights, average)
    ]
    norm = np.linalg.norm(sides[0] - sides[1])
    return float(norm), float(norm / np.linalg.norm(sides[1]))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"shadow_dtype": "float32"}),
        (torch.float16, {"shadow_dtype": "float64"}),
        (torch.float64, {"shadow_dtype": "bfloat16"}),
    ],
)
def test_drift_is_the_distance_of_the_current_weights_for_every_average(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, Any], offload: bool
) -> None:
    monkeypatch.setattr(drift, "AT_ONCE", 500)
    torch.manual_seed(3)
    weights = weights_of(dtype)
    ema = fastema.EMA(weights, (0.5, 0.9), offload=offload, **options)
    for _ in range(3):
        change(weights)
        ema.update()
        change(weights)
        for which, average in enumerate(ema.shadows):
            want = expected_drift(weights, average)
            assert ema.drift(which=which) == pytest.approx(want, rel=1e-6)
    with ema.swapped(which=0), pytest.raises(StateError, match=r"drift\(\) while"):
        ema.drift(which=0)
    with pytest.raises(ArgumentError, match="which=None"):
        ema.drift()


def test_drift_of_two_halves_is_that_of_the_whole_float32() -> None:
    torch.manual_seed(4)
    weights = {"w": torch.randn(3000).bfloat16()}
    halves = fastema.EMA(weights, 0.9, shadow_dtype="bf16+16")
    whole = fastema.EMA(weights, 0.9, shadow_dtype="float32")
    for _ in range(3):
        change(weights)
        halves.update()
        whole.update()
    assert halves.drift() == pytest.approx(whole.drift(), rel=1e-6)


def test_drift_of_complex_weights_counts_both_parts() -> None:
    weights = [np.array([3 + 4j, 0], np.complex64)]
    ema = fastema.EMA(weights, 0.5)
    weights[0] *= 2
    assert ema.drift() == (5.0, 1.0)


def test_drift_is_0_until_averaging_starts_and_infinite_beside_an_average_of_0() -> None:
    weights = [np.zeros(4)]
    late, ema = fastema.EMA(weights, 0.5, start_after=3), fastema.EMA(weights, 0.5)
    assert ema.drift() == (0.0, 0.0)
    weights[0] += 1
    assert late.drift() == (0.0, 0.0)
    assert ema.drift() == (2.0, np.inf)


def test_infinite_weights_show_in_the_drift_without_a_warning() -> None:
    weights = {"w": np.array([1.0, 2.0])}
    ema = fastema.EMA(weights, decay=0.5)
    weights["w"][1] = np.inf
    assert ema.drift() == (np.inf, np.inf)
    ema.update()
    assert np.isnan(ema.drift().distance)
