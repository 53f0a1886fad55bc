"""What a decay means: how far back it looks, in steps, samples or tokens.

A decay is per step, and averages over about ``1 / (1 - decay)`` steps:

======  ===============
decay   averages over
======  ===============
0.9     10 steps
0.99    100 steps
0.999   1,000 steps
0.9999  10,000 steps
======  ===============

Every function here takes ``per_step``, the units in a step: 1 for steps, the batch size (over all
devices) for samples, the tokens of a batch for tokens. A horizon given in samples or tokens stays
what it is when the batch size changes, one in steps does not; :func:`rescaled` converts a decay.
:func:`effective_steps` measures what any rule averages over at a step of a run.
"""

from __future__ import annotations

import math

from fastema.errors import ArgumentError
from fastema.rules.checks import checked_decay, checked_positive
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
    """Length that a constant decay averages over: ``per_step / (1 - decay)``.

    The mean age of what is in the average is one step less, and about 63 % of its weight is
    younger than this.

    Parameters
    ----------
    decay : float
        Per step, in [0, 1).
    per_step : float
        Units in a step, above 0: 1 gives steps, the batch size samples, tokens per step tokens.

    Returns
    -------
    float
        In these units.

    Raises
    ------
    ArgumentError
        For a number out of range.

    Examples
    --------
    >>> [round(effective_window(decay)) for decay in (0.9, 0.99, 0.999, 0.9999)]
    [10, 100, 1000, 10000]
    >>> round(effective_window(0.999, per_step=256))  # samples, in batches of 256
    256000
    """
    return checked_positive(per_step, "per_step") / (1.0 - checked_decay(decay))


def decay_of_window(window: float, per_step: float = 1) -> float:
    """The decay that averages over a length: ``1 - per_step / window``.

    Parameters
    ----------
    window : float
        In steps, samples or tokens; at least one step.
    per_step : float
        Units in a step, above 0.

    Returns
    -------
    float
        Per step, in [0, 1).

    Raises
    ------
    ArgumentError
        For a number out of range, or a window so long that its decay is 1 in float64.

    Examples
    --------
    >>> decay_of_window(1000)
    0.999
    """
    length, unit = checked_positive(window, "window"), checked_positive(per_step, "per_step")
    if length < unit:
        raise ArgumentError(f"window={window!r}: expected at least one step, {per_step!r}")
    return _below_one(1.0 - unit / length, "window", window)


def decay_of_half_life(half_life: float, per_step: float = 1) -> float:
    """The decay that halves a weight in a time: ``2 ** (-per_step / half_life)``.

    Parameters
    ----------
    half_life : float
        In steps, samples or tokens, above 0.
    per_step : float
        Units in a step, above 0.

    Returns
    -------
    float
        Per step, in [0, 1).

    Raises
    ------
    ArgumentError
        For a number out of range, or a half-life so long that its decay is 1 in float64.

    Examples
    --------
    >>> round(decay_of_half_life(500_000, per_step=256), 6)  # half a million images
    0.999645
    """
    length = checked_positive(half_life, "half_life")
    unit = checked_positive(per_step, "per_step")
    return _below_one(2.0 ** -(unit / length), "half_life", half_life)


def half_life_of_decay(decay: float, per_step: float = 1) -> float:
    """Time in which a decay halves a weight: ``per_step * log(1/2) / log(decay)``.

    Parameters
    ----------
    decay : float
        Per step, in [0, 1).
    per_step : float
        Units in a step, above 0.

    Returns
    -------
    float
        In these units; 0 for decay 0.

    Raises
    ------
    ArgumentError
        For a number out of range.

    Examples
    --------
    >>> round(half_life_of_decay(0.999), 1)
    692.8
    """
    value, unit = checked_decay(decay), checked_positive(per_step, "per_step")
    return -unit / math.log2(value) if value else 0.0


def rescaled(decay: float, factor: float) -> float:
    """The decay of a step that is ``factor`` times as long: ``decay ** factor``.

    With it, a batch size changed by this factor leaves the horizon in samples what it was.

    Parameters
    ----------
    decay : float
        Per step of the old length, in [0, 1).
    factor : float
        New batch size over old, above 0.

    Returns
    -------
    float
        Per step of the new length, in [0, 1).

    Raises
    ------
    ArgumentError
        For a number out of range, or a factor so small that the decay is 1 in float64.

    Examples
    --------
    >>> round(rescaled(0.999, 8), 6)
    0.992028

    References
    ----------
    D. Busbridge et al., How to Scale Your EMA, 2023, https://arxiv.org/abs/2307.13813
    """
    value = checked_decay(decay) ** checked_positive(factor, "factor")
    return _below_one(value, "factor", factor)


def _below_one(decay: float, name: str, given: object) -> float:
    if decay >= 1.0:
        raise ArgumentError(f"{name}={given!r}: the decay would be 1, and the average never move")
    return decay
