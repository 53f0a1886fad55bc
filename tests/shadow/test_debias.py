"""Averages that begin with nothing: those from zero, divided by the share of what was seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import fastema
from fastema import rules

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
    given, formula = DECAYS[decay]
    x = weights_at(0, dtype)
    options = {"start_after": start, "update_every": every}
    ema = fastema.EMA([x], given, zero_debias=True, **options)
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


def test_nothing_is_left_of_the_beginning() -> None:
    averages = []
    for start in (0.0, 1e30):
        x = np.full(10, start)
        ema = fastema.EMA([x], 0.9999, zero_debias=True)
        for step in range(1, 6):
            x[:] = step
            ema.update()
        averages.append(ema.shadow["0"])
    np.testing.assert_array_equal(averages[0], averages[1])
    # With a decay so near to 1 it is nearly the mean of what was seen.
    np.testing.assert_allclose(averages[0], 3.0, rtol=1e-3)


@pytest.mark.parametrize("count", [2, 3])
def test_several(count: int) -> None:
    x = np.random.default_rng(0).normal(size=50)
    decays = (0.9, 0.99, rules.warmup(0.999))[:count]
    ema = fastema.EMA([x], decays, zero_debias=True)
    alone = [fastema.EMA([x], decay, zero_debias=True) for decay in decays]
    for step in range(1, 30):
        x[:] = weights_at(step, float)[:50]
        for one in (ema, *alone):
            one.update()
    for shadow, one in zip(ema.shadows, alone, strict=True):
        np.testing.assert_array_equal(shadow["0"], one.shadow["0"])


def test_a_resumed_run_goes_on_with_the_share_it_had() -> None:
    x = np.ones(30)
    ema = fastema.EMA([x], rules.warmup(0.999), zero_debias=True)
    for step in range(1, 40):
        x[:] = weights_at(step, float)[:30]
        ema.update()
        if step == 20:
            state = ema.state_dict()
    y = np.ones(30)
    resumed = fastema.EMA([y], 0.5)
    resumed.load_state_dict(state)
    for step in range(21, 40):
        y[:] = weights_at(step, float)[:30]
        resumed.update()
    np.testing.assert_array_equal(resumed.shadow["0"], ema.shadow["0"])
    assert math.isclose(resumed.decay, ema.decay)
