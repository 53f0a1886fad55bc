"""Averages from snapshots, checked by quadrature and against step-by-step averages."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError
from fastema.rules import gamma_of
from fastema.rules.posthoc import ExponentialProfile, PowerProfile, Profile, Synthesis, dot, solve

steps = st.floats(1.0, 1e7)
powers = st.builds(PowerProfile, steps, st.one_of(st.floats(0.0, 5.0), st.floats(5.0, 500.0)))
exponentials = st.builds(
    lambda step, part: ExponentialProfile(step, step * part), steps, st.floats(1e-4, 1e3)
)
profiles = st.one_of(powers, exponentials)


def masses(profile: Profile, step: int) -> np.ndarray:
    """Integrate the density over each step, in closed form."""
    edges = np.arange(step + 1)
    if isinstance(profile, PowerProfile):
        return np.diff((edges / step) ** (profile.gamma + 1))
    assert isinstance(profile, ExponentialProfile)
    whole = np.exp2((edges - step) / profile.half_life)
    return np.diff(whole) / (1 - whole[0])


def shares(rule: rules.Rule, step: int, every: int) -> np.ndarray:
    found = np.zeros(0)
    for n in range(every, step + 1, every):
        w = rule.weight(n, every)
        found = np.append(found * (1 - w), w)
    return found


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("half_life", [3.0, 80.0, 2000.0])
def test_an_exponential_profile_equals_the_debiased_rule(half_life: float, every: int) -> None:
    step, rule = 400, rules.half_life(half_life)
    profile = ExponentialProfile(step, half_life)
    expected = masses(profile, step).reshape(-1, every).sum(1)
    np.testing.assert_allclose(shares(rules.debiased(rule), step, every), expected, rtol=1e-8)
    plain = shares(rule, step, every)
    np.testing.assert_allclose(plain, expected * (1 - profile.initial_share), rtol=1e-8)
    assert 1 - plain.sum() == pytest.approx(profile.initial_share, rel=1e-6, abs=1e-12)


@settings(deadline=None)
@given(profiles, profiles)
def test_dot_equals_quadrature(one: Profile, other: Profile) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    shared = min(one.step, other.step)

    def product(age: float) -> float:
        time = shared - age
        return float(one.density(time) * other.density(time))

    # The product falls with age, so panels shrink toward the shared end. full_output silences
    # warnings that rounding keeps the quadrature from the requested accuracy.
    edges = [0.0, *(shared * np.logspace(-8, 0, 30))]
    pieces = [
        integrate.quad(product, a, b, epsabs=0, epsrel=1e-12, limit=200, full_output=1)[0]
        if product(a) > 1e-30 * product(0.0)
        else 0.0
        for a, b in itertools.pairwise(edges)
    ]
    expected = math.fsum(pieces)
    if expected > 1e-250:
        assert dot(one, other) == pytest.approx(expected, rel=1e-10, abs=0.0)


LAST = 20_000  # step of the newest snapshot
TARGETS: list[Profile] = [
    *(PowerProfile(LAST, gamma_of(sigma_rel)) for sigma_rel in (0.03, 0.07, 0.15)),
    PowerProfile(11_111, gamma_of(0.08)),
    *(ExponentialProfile(*one) for one in ((LAST, 1_000), (13_000, 400), (LAST, 9_000))),
]


def snapshots(count: int) -> list[PowerProfile]:
    steps = [LAST * k / count for k in range(1, count + 1)]
    return [PowerProfile(n, gamma_of(width)) for n in steps for width in (0.05, 0.10)]


def distance(found: Synthesis, kept: Sequence[Profile], target: Profile) -> float:
    """Return the relative L2 distance between the profiles' masses per step."""

    def padded(profile: Profile) -> np.ndarray:
        own = masses(profile, int(profile.step))
        return np.append(own, np.zeros(LAST - len(own)))

    wanted = padded(target)
    made = sum(c * padded(p) for c, p in zip(found.coefficients, kept, strict=True) if c)
    return float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_the_reported_error_is_the_distance_of_profiles(target: Profile) -> None:
    kept = snapshots(20)
    found = solve(kept, target)
    assert sum(found.coefficients) == pytest.approx(1.0, abs=1e-12)
    assert found.error == pytest.approx(distance(found, kept, target), rel=2e-2, abs=0.0)
    assert found.error < (0.5 if target.step % 1000 else 0.15)
    newer = [c for c, p in zip(found.coefficients, kept, strict=True) if p.step > target.step]
    assert newer == [0.0] * len(newer)


@pytest.mark.parametrize("value", [None, 5, (1000, 0.5), rules.power(0.1)], ids=repr)
def test_values_that_are_no_profiles_are_refused(value: Any) -> None:
    good = PowerProfile(10, 1)
    for call in (
        lambda: solve([good, value], good),
        lambda: solve([good], value),
        lambda: dot(good, value),
        lambda: dot(value, ExponentialProfile(10, 1)),
    ):
        with pytest.raises(ArgumentError, match="profile"):
            call()


def test_invalid_numbers_are_refused_by_name() -> None:
    calls: list[tuple[str, Callable[[Any], object]]] = [
        ("step", lambda value: PowerProfile(value, 1.0)),
        ("step", lambda value: ExponentialProfile(value, 1.0)),
        ("half_life", lambda value: ExponentialProfile(10, value)),
        ("gamma", lambda value: PowerProfile(10, value)),
        ("noise", lambda value: solve([PowerProfile(10, 1)], PowerProfile(20, 1), noise=value)),
    ]
    for name, call in calls:
        zeros = [] if name in ("gamma", "noise") else [0]
        for value in (*zeros, -1, math.nan, math.inf, None, "x", True):
            with pytest.raises(ArgumentError, match=name):
                call(value)
