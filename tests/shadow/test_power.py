"""Power-function averages: their profile is the closed form, however often they are updated."""

from __future__ import annotations

import math

import numpy as np
import pytest

import fastema

SIGMAS = (0.05, 0.10, 0.2)


def gamma_of(sigma: float) -> float:
    """The root of the paper's cubic, found by halving."""
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = (low + high) / 2
        width = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
        low, high = (gamma, high) if width > sigma else (low, gamma)
    return low


@pytest.mark.parametrize("start", [0, 30])
@pytest.mark.parametrize("every", [1, 10])
def test_the_profile_is_the_closed_form(every: int, start: int) -> None:
    """Weights that are 1 in one element after another show the share that each step has."""
    updates = 120
    x = np.zeros(updates)
    average = fastema.PowerEMA([x], SIGMAS, update_every=every, start_after=start)
    n = updates * every
    for step in range(1, start + n + 1):
        x[:] = 0
        x[max(step - start - 1, 0) // every] = 1
        average.update()
    last = np.arange(1, updates + 1) * every
    for sigma, shadow in zip(SIGMAS, average.shadows, strict=True):
        power = gamma_of(sigma) + 1
        share = (last / n) ** power - ((last - every) / n) ** power
        profile = shadow["0"]
        np.testing.assert_allclose(profile, share, rtol=1e-9, atol=1e-14)
        assert profile.sum() == pytest.approx(1, abs=1e-12)
        # Its width is the one that was asked for, to the coarseness of the steps.
        ages = n - last
        mean = (profile * ages).sum()
        std = math.sqrt((profile * (ages - mean) ** 2).sum())
        assert std / n == pytest.approx(sigma, abs=1 / updates)
        assert mean / n == pytest.approx(1 / (power + 1), abs=1 / updates)
