"""Weights for averaging finished checkpoints, listed oldest first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

from fastema.errors import ArgumentError
from fastema.rules.checks import validate_int
from fastema.rules.posthoc import PowerProfile, solve
from fastema.rules.power import gamma_of

__all__ = ["DECAYS", "ema", "sigma_rel", "sma", "swa", "wma", "wsm"]


def swa(count: int) -> list[float]:
    """Return equal weights, ``1 / count`` each.

    References
    ----------
    P. Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018,
    https://arxiv.org/abs/1803.05407
    """
    return [1.0 / count] * count


def sma(count: int, last: int) -> list[float]:
    """Return equal weights for the ``last`` checkpoints and 0 for all older ones."""
    last = validate_int(last, "sma", 1)
    if last > count:
        raise ArgumentError(f"sma={last}: there are {count} checkpoints")
    return [0.0] * (count - last) + [1.0 / last] * last


def ema(steps: Sequence[int], decay: float) -> list[float]:
    """Return the weights of an EMA with ``decay`` per step that sees each checkpoint once.

    The checkpoint at step ``t_j`` weighs ``decay**(T - t_j) - decay**(T - t_(j-1))``, where ``T``
    is the last step. The oldest weighs ``decay**(T - t_0)``, so that the weights sum to 1.
    """
    if not 0.0 <= decay < 1.0:
        raise ArgumentError(f"ema={decay!r}: expected a decay in [0, 1), per step")
    if any(one >= other for one, other in itertools.pairwise(steps)):
        raise ArgumentError(f"ema needs checkpoints with rising steps, got {list(steps)}")
    remaining = [decay ** (steps[-1] - step) for step in steps]
    before = [0.0, *remaining[:-1]]
    return [one - other for one, other in zip(remaining, before, strict=True)]


def wma(count: int) -> list[float]:
    """Return weights proportional to ``j`` for the j-th checkpoint; the oldest has ``j = 1``."""
    total = count * (count + 1) / 2
    return [(j + 1) / total for j in range(count)]


DECAYS: Final[dict[str, Callable[[float], float]]] = {
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
    "1-sqrt": lambda t: 1.0 - math.sqrt(t),
}
"""Learning rate decays, from 1 at ``t = 0`` to 0 at ``t = 1``."""


def wsm(count: int, decay: str) -> list[float]:
    """Return weights that emulate a learning rate decay from the oldest to the newest checkpoint.

    The updates between checkpoints ``j - 1`` and ``j`` are scaled by the learning rate
    ``r_j = decay(j / count)``, with ``r_0 = 1``. Checkpoint ``j`` therefore weighs
    ``r_j - r_(j+1)``, and the newest weighs its own ``r``. With the linear decay this is the mean.

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
    """Return weights of power-function snapshots that give an average of another width.

    The weights solve a least-squares fit of the profiles, as in
    :func:`fastema.posthoc.synthesize`. Also return the fit's relative error.
    """
    profiles = [PowerProfile(step, gamma) for step, gamma in zip(steps, gammas, strict=True)]
    solution = solve(profiles, PowerProfile(max(steps), gamma_of(width)))
    return [float(one) for one in solution.coefficients], solution.error
