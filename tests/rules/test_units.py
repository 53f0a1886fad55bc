"""Decays, windows and half-lives, in steps, samples and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError
from fastema.rules import units

lengths = st.floats(1.0, 1e9)


@given(lengths)
def test_a_half_life_halves(length: float) -> None:
    # Beyond this the decay itself has too few digits left below 1.
    decay = units.decay_of_half_life(length)
    assert length * math.log(decay) == pytest.approx(
        -math.log(2), rel=1e-15 * length + 1e-12, abs=0.0
    )
    assert units.decay_of_half_life(length) == rules.half_life(length).decay(1)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, None, "x", True], ids=repr)
def test_what_is_no_length(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"window.*above 0"):
        units.decay_of_window(value)
    with pytest.raises(ArgumentError, match=r"half_life.*above 0"):
        units.decay_of_half_life(value)
    with pytest.raises(ArgumentError, match=r"factor.*above 0"):
        units.rescaled(0.9, value)
    functions: list[Callable[..., float]] = [
        units.effective_window,
        units.half_life_of_decay,
        units.decay_of_window,
        units.decay_of_half_life,
    ]
    for function, first in zip(functions, (0.9, 0.9, 10, 10), strict=True):
        with pytest.raises(ArgumentError, match=r"per_step.*above 0"):
            function(first, per_step=value)


def test_decays_that_would_be_one() -> None:
    for call, name in (
        (lambda: units.decay_of_window(1e18), "window"),
        (lambda: units.decay_of_half_life(1e18), "half_life"),
        (lambda: units.rescaled(0.9, 1e-18), "factor"),
    ):
        with pytest.raises(ArgumentError, match=rf"{name}.*would be 1"):
            call()
