"""Conversions between decays and horizons in steps, samples or tokens.

A decay is per step and averages over about ``1 / (1 - decay)`` steps:

======  ===============
decay   averages over
======  ===============
0.9     10 steps
0.99    100 steps
0.999   1,000 steps
0.9999  10,000 steps
======  ===============

The conversions take ``per_step``, the units per step, above 0: 1 for steps, the batch size (over
all devices) for samples, the tokens per batch for tokens. Decays are per step, in [0, 1). If the
batch size changes, a horizon in samples or tokens keeps its meaning, a horizon in steps does not;
:func:`rescaled` converts a decay. :func:`effective_steps` measures what any rule averages over at a
step of a run.

All functions raise an :class:`~fastema.errors.ArgumentError` if a number is out of range, or if the
decay would round to 1 in float64.
"""

from __future__ import annotations

import math

from fastema.errors import ArgumentError
from fastema.rules.checks import validate_decay, validate_positive
from fastema.rules.reach import Reach, effective_steps

__all__ = [
    "Reach",
    "decay_of_half_life",
    "decay_of_window",
    "effective_steps",
    "effective_window",
    "half_life_of_decay",
    "rescaled",
]


def effective_window(decay: float, per_step: float = 1) -> float:
    """Return the length that a constant decay averages over: ``per_step / (1 - decay)``.

    The mean age of the averaged values is one step less. About 63 % of the weight belongs to values
    that are younger than this length.

    Examples
    --------
    >>> [round(effective_window(decay)) for decay in (0.9, 0.99, 0.999, 0.9999)]
    [10, 100, 1000, 10000]
    >>> round(effective_window(0.999, per_step=256))  # samples, in batches of 256
    256000
    """
    return validate_positive(per_step, "per_step") / (1.0 - validate_decay(decay))


def decay_of_window(window: float, per_step: float = 1) -> float:
    """Return the decay that averages over ``window``, at least a step: ``1 - per_step / window``.

    Examples
    --------
    >>> decay_of_window(1000)
    0.999
    """
    length, unit = validate_positive(window, "window"), validate_positive(per_step, "per_step")
    if length < unit:
        raise ArgumentError(f"window={window!r}: expected at least one step, {per_step!r}")
    return _below_one(1.0 - unit / length, "window", window)


def decay_of_half_life(half_life: float, per_step: float = 1) -> float:
    """Return the decay that halves a weight in ``half_life > 0``: ``2 ** (-per_step / half_life)``.

    Examples
    --------
    >>> round(decay_of_half_life(500_000, per_step=256), 6)  # half a million images
    0.999645
    """
    length = validate_positive(half_life, "half_life")
    unit = validate_positive(per_step, "per_step")
    return _below_one(2.0 ** -(unit / length), "half_life", half_life)


def half_life_of_decay(decay: float, per_step: float = 1) -> float:
    """Return the half-life of a decay: ``per_step * log(1/2) / log(decay)``, and 0 for decay 0.

    Examples
    --------
    >>> round(half_life_of_decay(0.999), 1)
    692.8
    """
    value, unit = validate_decay(decay), validate_positive(per_step, "per_step")
    return -unit / math.log2(value) if value else 0.0


def rescaled(decay: float, factor: float) -> float:
    """Return the decay for a step ``factor`` times as long: ``decay ** factor``.

    To keep the horizon in samples when the batch size changes, let ``factor`` be the new batch size
    divided by the old one. It must be above 0.

    Examples
    --------
    >>> round(rescaled(0.999, 8), 6)
    0.992028

    References
    ----------
    D. Busbridge et al., How to Scale Your EMA, 2023, https://arxiv.org/abs/2307.13813
    """
    value = validate_decay(decay) ** validate_positive(factor, "factor")
    return _below_one(value, "factor", factor)


def _below_one(decay: float, name: str, given: object) -> float:
    if decay >= 1.0:
        raise ArgumentError(f"{name}={given!r}: the decay would be 1 and never change the average")
    return decay
