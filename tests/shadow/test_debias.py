"""Averages that begin with nothing: those from zero, divided by the share of what was seen."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import fastema
from fastema import rules
from fastema.errors import CheckpointError
from fastema.shadow.schedule_counter import refuse_uneven

from .truth import Loop

DECAYS: dict[str, tuple[Any, Callable[[int], float]]] = {
    "number": (0.95, lambda n: 0.95),
    "slow": (0.9999, lambda n: 0.9999),
    "zero": (0.0, lambda n: 0.0),
    "half-life": (rules.half_life(20), lambda n: 0.5 ** (1 / 20)),
    "warmup": (rules.warmup(0.99), lambda n: min(0.99, (1 + n) / (10 + n))),
}


def weights_at(step: int, dtype: Any) -> np.ndarray:
    return np.random.default_rng(step).normal(size=300).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 5), (3, 1), (7, 2)])
def test_it_is_the_average_from_zero_over_what_was_seen(
    decay: str, start: int, every: int, dtype: Any
) -> None:
    rule, formula = DECAYS[decay]
    x = weights_at(0, dtype)
    options = {"start_after": start, "update_every": every}
    ema = fastema.EMA([x], rule, zero_debias=True, **options)
    code = "f32" if dtype == np.float32 else "f64"
    loop = Loop(x, code, code)
    zero, left = np.zeros(300), Fraction(1)  # a float64 would lose digits of what was seen
    for step in range(1, 151):
        x[:] = weights_at(step, dtype)
        ema.update()
        n = step - start
        if n <= 0:
            loop = Loop(x, code, code)
            continue
        if n % every:
            continue
        kept = Fraction(formula(n)) ** every
        zero = float(kept) * zero + float(1 - kept) * x.astype(np.float64)
        left *= kept
        want = zero / float(1 - left)
        loop.step(x, float((1 - kept) / (1 - left)))
        np.testing.assert_allclose(loop.value, want, rtol=1e-9, atol=1e-12)
        loop.check(ema.shadow["0"])
    assert not np.allclose(ema.shadow["0"], x) or decay == "zero"


MIXED = {
    "constant": rules.constant(0.9),
    "slow": rules.constant(0.999999),
    "warmup": rules.warmup(0.999),
    "inverse-gamma": rules.inverse_gamma(0.9999, 2.0, 0.7),
    "power": rules.power(0.1),
    "mean": rules.cumulative_mean(),
}


@pytest.mark.parametrize("rule", ["constant", "slow", "warmup"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_count_on_a_gpu_goes_on_with_single_steps_alone(rule: str, every: int) -> None:
    corrected = rules.debiased(MIXED[rule])
    single = fastema.EMA([np.ones(3)], corrected, update_every=every)
    for _ in range(30):
        single.update()
    refuse_uneven(single.schedule, 30, single.state_dict()["log_decays"])
    uneven = fastema.EMA([np.ones(3)], corrected, update_every=every)
    uneven.update()
    uneven.update(steps=29)
    if rule == "warmup":
        with pytest.raises(CheckpointError, match="capturable"):
            refuse_uneven(uneven.schedule, 30, uneven.state_dict()["log_decays"])
    else:  # a constant leaves the same of the beginning however the steps are cut
        refuse_uneven(uneven.schedule, 30, uneven.state_dict()["log_decays"])
