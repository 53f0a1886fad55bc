"""Decay schedules as pure functions: formulas, limits, monotony."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError

decays = st.floats(0.0, 1.0, exclude_max=True)
updates = st.integers(1, 10**9)
positive = st.floats(1e-3, 1e3)


@given(decays, updates)
@example(0.999, 8_989)
@example(0.999, 8_990)
def test_warmup_formula(decay: float, n: int) -> None:
    assert rules.warmup(decay).decay(n) == min(decay, (1 + n) / (10 + n))


@given(decays, positive, positive, updates)
def test_inverse_gamma_formula(decay: float, inv_gamma: float, power: float, n: int) -> None:
    rule = rules.inverse_gamma(decay, inv_gamma, power)
    grown = -math.expm1(-power * math.log1p((n - 1) / inv_gamma))
    assert rule.decay(n) == pytest.approx(min(decay, grown), abs=1e-12)
    assert rule.decay(1) == 0.0


@given(st.floats(1e-3, 1e6))
def test_half_life_halves(count: float) -> None:
    decay = rules.half_life(count).decay(1)
    if decay > 0.0:
        assert count * math.log2(decay) == pytest.approx(-1.0, rel=1e-6, abs=0.0)


NO_DECAYS: list[Any] = [
    1.0,
    1,
    True,
    -1e-9,
    2.0,
    math.nan,
    math.inf,
    -math.inf,
    None,
    "x",
    [0.5],
    1j,
]


@pytest.mark.parametrize("decay", NO_DECAYS, ids=repr)
def test_what_is_no_decay(decay: Any) -> None:
    for make in (rules.constant, rules.warmup, rules.inverse_gamma):
        with pytest.raises(ArgumentError, match=r"\[0, 1\)"):
            make(decay)
    with pytest.raises(ArgumentError, match="minimum"):
        rules.inverse_gamma(0.9, minimum=decay)


@pytest.mark.parametrize("value", [0, -1, 0.0, math.nan, math.inf, None, "x", True, [1]], ids=repr)
def test_what_is_not_positive(value: Any) -> None:
    with pytest.raises(ArgumentError, match="above 0"):
        rules.half_life(value)
    with pytest.raises(ArgumentError, match=r"inv_gamma.*above 0"):
        rules.inverse_gamma(0.9, inv_gamma=value)
    with pytest.raises(ArgumentError, match=r"power.*above 0"):
        rules.inverse_gamma(0.9, power=value)


def test_a_minimum_above_the_limit() -> None:
    with pytest.raises(ArgumentError, match="minimum"):
        rules.inverse_gamma(0.9, minimum=0.95)


@pytest.mark.parametrize("every", [1, 3, 64, 65, 1000, 40_000])
@pytest.mark.parametrize("fraction", [0.02, 0.05, 1.0])
def test_a_share_of_the_run_is_the_product_of_its_decays(fraction: float, every: int) -> None:
    rule = rules.half_life_fraction(fraction)
    for n in (every, 2 * every, 50 * every):
        steps = range(n - every + 1, n + 1)
        left = math.fsum(-math.log(2.0) / (fraction * step) for step in steps)
        assert rule.weight(n, every) == pytest.approx(-math.expm1(left), rel=1e-13)
    assert rule.decay(7) == pytest.approx(0.5 ** (1 / (7 * fraction)), rel=1e-15)
