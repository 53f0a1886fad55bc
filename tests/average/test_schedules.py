"""Averages by every rule, compared with float64 loops over the weights of its formula."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
from fastema import rules

from ..support.states import nested
from .truth import Loop

Decays = Callable[[int], float]

# Each schedule with an independent formula for its decay at step n.
PLAIN: dict[str, tuple[Any, Decays]] = {
    "number": (0.95, lambda n: 0.95),
    "slow": (0.9999, lambda n: 0.9999),
    "zero": (0.0, lambda n: 0.0),
    "warmup": (rules.warmup(0.99), lambda n: min(0.99, (1 + n) / (10 + n))),
    "half-life": (rules.half_life(20), lambda n: 0.5 ** (1 / 20)),
    "inverse gamma": (
        rules.inverse_gamma(0.9, inv_gamma=2.0, power=0.75, minimum=0.1),
        lambda n: min(0.9, max(0.1, 1 - (1 + (n - 1) / 2) ** -0.75)),
    ),
    "growing": (rules.inverse_gamma(0.9999, power=1.0), lambda n: 1 - 1 / n),
}
DEBIASED = ("number", "slow", "zero", "warmup", "half-life")


def decay_weights(decay: Decays, every: int) -> Iterator[float]:
    return (1 - decay(n) ** every for n in count(every, every))


def debiased_weights(decay: Decays, every: int) -> Iterator[float]:
    left = Fraction(1)  # a float64 would lose digits of 1 - left
    for n in count(every, every):
        kept = Fraction(decay(n)) ** every
        left *= kept
        yield float((1 - kept) / (1 - left))


def mean_weights(every: int) -> Iterator[float]:
    return (1 / n for n in count(1))


def power_weights(every: int) -> Iterator[float]:
    return (1 - (1 - every / n) ** (rules.gamma_of(0.1) + 1) for n in count(every, every))


# How to build each average, and its update weights for a given `update_every`.
AVERAGES: dict[str, tuple[Callable[..., Any], Callable[[int], Iterator[float]]]] = {
    **{
        name: (partial(fastema.EMA, decay=d), partial(decay_weights, f))
        for name, (d, f) in PLAIN.items()
    },
    **{
        f"{name}, debiased": (
            partial(fastema.EMA, decay=PLAIN[name][0], zero_debias=True),
            partial(debiased_weights, PLAIN[name][1]),
        )
        for name in DEBIASED
    },
    "mean": (fastema.SWA, mean_weights),
    "power": (partial(fastema.PowerEMA, sigma_rels=0.1), power_weights),
}
DTYPES = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "c64": np.complex64}


def numbers(seed: int, dtype: Any = np.float32, size: int = 100) -> np.ndarray:
    values = np.random.default_rng(seed).normal(1, 1, (2, size))
    return (values[0] + 1j * values[1] if np.dtype(dtype).kind == "c" else values[0]).astype(dtype)


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 5), (3, 1), (7, 2), (0, 10)])
@pytest.mark.parametrize("kind", AVERAGES)
def test_average_equals_a_loop_with_the_weights_of_its_formula(
    kind: str, start: int, every: int, code: str
) -> None:
    build, weights_of = AVERAGES[kind]
    x = numbers(0, DTYPES[code])
    average = build([x], start_after=start, update_every=every)
    real = "f32" if code == "c64" else code
    dtype = DTYPES[real]
    arithmetic = "f32" if code == "f16" else real

    def fresh() -> Loop:
        return Loop(x.view(dtype), real, arithmetic, random=code == "f16")

    loop, weights = fresh(), weights_of(every)
    for step in range(1, 151):
        x[:] = numbers(step, DTYPES[code])
        average.update()
        n = step - start
        if n <= 0:
            loop = fresh()
        elif n % every == 0:
            weight = next(weights)
            loop.step(x.view(dtype), weight)
            assert kind not in PLAIN or math.isclose(1 - average.decay**every, weight, abs_tol=1e-9)
        loop.check(average.shadow["0"].view(dtype))
        assert average.num_updates == step


def test_power_average_has_the_requested_width() -> None:
    """Step n sets element n alone to 1, so that the average holds the share of each step."""
    steps, widths = 400, (0.05, 0.10, 0.2)
    x = np.zeros(steps)
    average = fastema.PowerEMA([x], widths)
    for step in range(steps):
        x[:] = np.arange(steps) == step
        average.update()
    ages = np.arange(steps)[::-1]
    for width, shadow in zip(widths, average.shadows, strict=True):
        profile = shadow["0"]
        assert profile.sum() == pytest.approx(1, abs=1e-12)
        mean = (profile * ages).sum()
        std = math.sqrt((profile * (ages - mean) ** 2).sum())
        assert std / steps == pytest.approx(width, abs=1 / steps)  # to the resolution of one step


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
@pytest.mark.parametrize(("m", "n"), [(1, 2), (10, 11), (40, 100), (99, 100)])
def test_mean_between_two_means_is_the_mean_of_their_window(m: int, n: int, dtype: Any) -> None:
    weights = {"a": numbers(0, dtype), "count": np.arange(3)}
    wide = np.complex128 if np.dtype(dtype).kind == "c" else np.float64
    swa = fastema.SWA(weights, shadow_dtype="float64")
    seen = []
    for step in range(1, n + 1):
        weights["a"][:] = numbers(step, dtype)
        weights["count"][:] = step
        swa.update()
        seen.append(weights["a"].astype(wide))
        if step == m:
            earlier = nested(swa.state_dict())["shadow"][0]
    got = fastema.mean_between(swa.shadow, n, earlier, m)
    assert set(got) == {"a"}
    assert got["a"].dtype == wide
    want = np.mean(seen[m:], axis=0)
    # Some float64 roundings, amplified by the ratio of the windows.
    np.testing.assert_allclose(got["a"], want, rtol=0, atol=8 * n / (n - m) * n * 2.0**-53)


CUTS = st.lists(st.integers(1, 30), min_size=1, max_size=15)


@given(st.floats(0.3, 0.999), CUTS)
def test_update_over_k_steps_uses_decay_to_the_kth_power(decay: float, cuts: list[int]) -> None:
    x = numbers(0)
    ema = fastema.EMA([x], decay)
    truth = Loop(x, "f32", "f32")
    for n, steps in enumerate(cuts):
        x[...] = numbers(n + 1)
        ema.update(steps=steps)
        truth.step(x, 1 - decay**steps)
    truth.check(ema.shadow["0"])
    assert ema.num_updates == sum(cuts)


@given(st.floats(0.02, 0.28), CUTS, st.integers(1, 5))
def test_power_average_weighs_an_update_by_the_steps_it_covers(
    width: float, cuts: list[int], every: int
) -> None:
    x = numbers(0, np.float64)
    ema = fastema.PowerEMA([x], width, update_every=every)
    exponent = rules.gamma_of(width) + 1
    total, end, step = np.zeros_like(x), 0.0, 0
    for n, steps in enumerate(cuts):
        x[...] = numbers(n + 1, np.float64)
        ema.update(steps=steps)
        step += steps
        begin, end = end, float(step // every * every)
        total += (end**exponent - begin**exponent) * x
    if end:
        mean = total / end**exponent
        np.testing.assert_allclose(ema.shadow["0"], mean, rtol=1e-9, atol=1e-9)
