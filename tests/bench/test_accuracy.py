"""The accuracy question measures against exact recursions, and sees what stalls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastema
from bench.questions import accuracy

pytestmark = pytest.mark.torch

TINY = accuracy.Amount(elements=2_000, short=20, run_elements=256, marks=(40, 200))
FEW_DECAYS = (0.999, 0.9999)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize(
    ("average", "weights"), [("bf16", "bf16"), ("bf16", "f32"), ("f16", "f32"), ("f16", "f64")]
)
def test_one_update_in_units_of_the_last_place(average: str, weights: str) -> None:
    nearest, at_random = (
        accuracy.one_update(average, weights, rounding, 5_000, generator())
        for rounding in ("nearest", "stochastic")
    )
    # What is rounded is off by up to a unit in the last place of a float32 itself.
    assert 0.45 < nearest <= 0.5 + 2.0**-12
    assert 0.9 < at_random <= 1 + 2.0**-12


def test_an_update_that_does_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastema, "lerp_", lambda avg, x, weight: None)
    assert accuracy.one_update("f32", "f32", "nearest", 1_000, generator()) > 1_000


@pytest.mark.parametrize(
    ("average", "least", "most"), [("f64", 0.0, 1e-15), ("f32", 1e-8, 1e-6), ("bf16", 1e-4, 1e-2)]
)
def test_many_updates(average: str, least: float, most: float) -> None:
    rounding = "stochastic" if average == "bf16" else "nearest"
    error = accuracy.many_updates(average, "bf16", rounding, 500, 60, generator())
    assert least <= error <= most


def test_exact_average_is_the_sum_in_closed_form() -> None:
    decay, path = 0.9, np.random.default_rng(5).normal(size=(31, 17)) + 3.0
    exact = accuracy.Exact(torch.from_numpy(path[0]), decay)
    for row in path[1:]:
        exact.update(torch.from_numpy(row))
    powers = decay ** np.arange(29, -1, -1)
    closed = decay**30 * path[0] + (1 - decay) * powers @ path[1:]
    np.testing.assert_allclose(exact.average, closed, rtol=1e-14)
    assert np.array_equal(exact.start, path[0])


@pytest.mark.slow
def test_long_run_sees_what_precision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "DECAYS", FEW_DECAYS)
    with accuracy.one_thread():
        rows = list(accuracy.long_runs(TINY))

    def figures(name: str, figure: str) -> list[float]:
        found = [row[figure] for row in rows if row.entry == name and figure in row.figures]
        assert len(found) == len(accuracy.MODELS) * len(FEW_DECAYS) * len(TINY.marks)
        return found

    assert max(figures("f32: fastema", "of_movement")) < 0.005
    # Two halves of a float32 are that float32; what is stored of it is its nearest bfloat16.
    whole = figures("bf16+16: fastema", "relative")
    assert whole == figures("f32: fastema", "relative")
    assert len(set(whole)) == 8
    half = figures(f"bf16, nearest: {accuracy.HALF}", "relative")
    once = figures(f"bf16: {accuracy.ONCE}", "relative")
    assert half == pytest.approx(once, rel=1e-3)
    for dtype, stalled in (("bf16", 0.8), ("f16", 0.3)):
        nearest, at_random = (f"{dtype}, {how}: fastema" for how in ("nearest", "stochastic"))
        assert min(figures(nearest, "still")) > stalled
        assert max(figures(nearest, "followed")) < 0.5
        moving = figures(at_random, "still")
        for still, other in zip(figures(nearest, "still"), moving, strict=True):
            assert still > other + 0.1
