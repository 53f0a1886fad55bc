"""What finished checkpoints weigh in an average of them, oldest first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

from fastema.errors import ArgumentError
from fastema.rules.checks import checked_whole
from fastema.rules.posthoc import PowerProfile, solve
from fastema.rules.power import gamma_of

__all__ = ["DECAYS", "ema", "sigma_rel", "sma", "swa", "wma", "wsm"]


def swa(count: int) -> list[float]:
    """Weigh all alike: ``1 / count``.

    References
    ----------
    P. Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018,
    https://arxiv.org/abs/1803.05407
    """
    return [1.0 / count] * count


def sma(count: int, last: int) -> list[float]:
    """Weigh the ``last`` ones alike, and the others 0."""
    last = checked_whole(last, "sma", 1)
    if last > count:
        raise ArgumentError(f"sma={last}: there are {count} checkpoints")
    return [0.0] * (count - last) + [1.0 / last] * last


def ema(steps: Sequence[int], decay: float) -> list[float]:
    """Weigh each by the steps since the one before it, as an average that sees each of them once.

    ``decay**(T - t_j) - decay**(T - t_(j-1))`` for the one of step ``t_j``, where ``T`` is the last
    step; the oldest has the rest, ``decay**(T - t_0)``.
    """
    if not 0.0 <= decay < 1.0:
        raise ArgumentError(f"ema={decay!r}: expected a decay in [0, 1), per step")
    if any(one >= other for one, other in itertools.pairwise(steps)):
        raise ArgumentError(f"ema needs checkpoints of rising steps, got {list(steps)}")
    remaining = [decay ** (steps[-1] - step) for step in steps]
    before = [0.0, *remaining[:-1]]
    return [one - other for one, other in zip(remaining, before, strict=True)]


def wma(count: int) -> list[float]:
    """Weigh the j-th by ``j``, counted from 1 for the oldest."""
    total = count * (count + 1) / 2
    return [(j + 1) / total for j in range(count)]


DECAYS: Final[dict[str, Callable[[float], float]]] = {
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
    "1-sqrt": lambda t: 1.0 - math.sqrt(t),
}
"""Learning rates that fall from 1 to 0 as ``t`` goes from 0 to 1."""


def wsm(count: int, decay: str) -> list[float]:
    """Weigh as if the learning rate had decayed from the oldest to the newest.

    The updates between the j-th and the one before count with the learning rate ``r_j``, where
    ``r_0 = 1`` and ``r_j`` falls to what it is one place before 0: so checkpoint 0 weighs
    ``1 - r_1``, the j-th ``r_j - r_(j+1)``, and the newest its own ``r``. The linear decay is the
    mean.

    References
    ----------
    C. Tian et al., WSM: decay-free learning rate schedule via checkpoint merging for LLM
    pre-training, 2025, https://arxiv.org/abs/2507.17634
    """
    if decay not in DECAYS:
        raise ArgumentError(f"wsm={decay!r}: expected one of {', '.join(DECAYS)}")
    rates = [DECAYS[decay](j / count) for j in range(count)] + [0.0]
    return [one - other for one, other in itertools.pairwise(rates)]


def sigma_rel(
    steps: Sequence[int], gammas: Sequence[float], width: float
) -> tuple[list[float], float]:
    """Weigh snapshots of power-function averages for the average of another width.

    Least squares of the profiles, as in :func:`fastema.posthoc.synthesize`; the second number is
    how far the result is from the profile that was asked for.
    """
    profiles = [PowerProfile(step, gamma) for step, gamma in zip(steps, gammas, strict=True)]
    solution = solve(profiles, PowerProfile(max(steps), gamma_of(width)))
    return [float(one) for one in solution.coefficients], solution.error
