"""Several steps of training taken in at once: ``update(steps=d)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
from fastema import rules
from fastema.errors import ArgumentError, StateError

from .truth import Loop

CUTS = st.lists(st.integers(1, 30), min_size=1, max_size=15)


def values(seed: int, shape: tuple[int, ...] = (67,)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(st.floats(0.3, 0.999), CUTS)
def test_an_update_over_steps_is_decay_to_their_number(decay: float, cuts: list[int]) -> None:
    x = values(0)
    ema = fastema.EMA([x], decay)
    truth = Loop(x, "f32", "f32")
    for n, steps in enumerate(cuts):
        x[...] = values(n + 1)
        ema.update(steps=steps)
        truth.step(x, 1 - decay**steps)
    truth.check(ema.shadow["0"])
    assert ema.num_updates == sum(cuts)


@given(st.floats(0.02, 0.28), CUTS, st.integers(1, 5))
def test_a_power_average_weighs_a_step_by_its_stretch_of_the_run(
    width: float, cuts: list[int], every: int
) -> None:
    x = values(0).astype(np.float64)
    ema = fastema.PowerEMA([x], width, update_every=every)
    exponent = rules.gamma_of(width) + 1
    total, end, step = np.zeros_like(x), 0, 0
    for n, steps in enumerate(cuts):
        x[...] = values(n + 1)
        ema.update(steps=steps)
        step += steps
        begin, end = end, step // every * every
        total += (float(end) ** exponent - float(begin) ** exponent) * x
    if end:
        np.testing.assert_allclose(
            ema.shadow["0"], total / float(end) ** exponent, rtol=1e-9, atol=1e-9
        )


def test_random_bits_are_those_of_the_step_that_is_reached() -> None:
    x = values(0, (5000,)).astype(np.float16)
    jump = fastema.EMA([x], 0.9, seed=3)
    walk = fastema.EMA([x], 0.9, seed=3)
    walk.load_state_dict({**walk.state_dict(), "num_updates": 6})
    x[...] = values(1, (5000,)).astype(np.float16)
    jump.update(steps=4)
    walk.update(steps=4)
    differ = np.mean(jump.shadow["0"].view(np.uint16) != walk.shadow["0"].view(np.uint16))
    assert 0.05 < differ < 0.95
    again = fastema.EMA([values(0, (5000,)).astype(np.float16)], 0.9, seed=3)
    again.update([x], steps=4)
    np.testing.assert_array_equal(again.shadow["0"], jump.shadow["0"])


@pytest.mark.parametrize("steps", [0, -1, 1.0, 2.5, "3", None, True, np.nan, 2**63], ids=repr)
def test_what_is_no_number_of_steps(steps: Any) -> None:
    x = values(0)
    ema = fastema.EMA([x], 0.5)
    x[...] = values(1)
    with pytest.raises(ArgumentError, match="steps"):
        ema.update(steps=steps)
    with ema.swapped(), pytest.raises(StateError, match="restore"):
        ema.update(steps=2)
    assert ema.num_updates == 0
    np.testing.assert_array_equal(ema.shadow["0"], values(0))
