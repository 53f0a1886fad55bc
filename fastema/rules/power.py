"""Averages whose memory grows with the run: weights by a power of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastema.errors import ArgumentError
from fastema.rules.checks import checked_least, checked_positive
from fastema.rules.rule import Rule

__all__ = ["Power", "checked_gamma", "gamma_of", "power", "sigma_rel_of"]

_WIDEST = 1 / math.sqrt(12)  # sigma_rel of the uniform profile, gamma = 0
_STEEPEST = 1e100  # products of two exponents stay finite


def checked_gamma(gamma: Any) -> float:
    """An exponent as a float in [0, 1e100]; anything else is an error."""
    value = checked_least(gamma, "gamma", 0.0)
    if value > _STEEPEST:
        raise ArgumentError(f"gamma={gamma!r}: expected at most {_STEEPEST:g}")
    return value


@dataclass(frozen=True, slots=True)
class Power(Rule):
    """An average that weights the step ``s`` of ``n`` in proportion to ``s**gamma``.

    Over a stretch of ``every`` steps the decay is ``(1 - every/n) ** (gamma + 1)``: the share of
    step ``s`` in the average at ``n`` is exactly ``(s/n)**(gamma+1) - ((s-every)/n)**(gamma+1)``,
    the integral of the profile over that stretch. The first update copies the weights.

    Parameters
    ----------
    gamma : float
        The exponent, in [0, 1e100]: ``gamma = 0`` is the cumulative mean; :func:`power` takes the
        width instead, and has the reference. (Profiles with ``-1 < gamma < 0`` favour the oldest
        weights and share their ``sigma_rel`` with others.)
    """

    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", checked_gamma(self.gamma))

    @property
    def sigma_rel(self) -> float:
        """Standard deviation of the profile as a share of the run so far."""
        return sigma_rel_of(self.gamma)

    def decay(self, n: int) -> float:
        """``(1 - 1/n) ** (gamma + 1)``."""
        return float((1.0 - 1.0 / n) ** (self.gamma + 1.0))

    def weight(self, n: int, every: int = 1) -> float:
        """``1 - (1 - every/n) ** (gamma + 1)``."""
        if n <= every:
            return 1.0
        return -math.expm1((self.gamma + 1.0) * math.log1p(-every / n))


def power(sigma_rel: float = 0.05) -> Power:
    """The power-function average of a relative width.

    The average at step ``n`` looks back by about ``n * sigma_rel``, whatever ``n`` is: its profile
    keeps its shape and stretches with the run. Averages of two widths, kept as snapshots, give any
    other after the run (:mod:`fastema.rules.posthoc`).

    Parameters
    ----------
    sigma_rel : float
        Standard deviation of the profile divided by the steps so far, in (0, 0.2887]; the paper's
        values are 0.05 and 0.10.

    Examples
    --------
    >>> round(power(0.05).gamma, 2), round(power(0.10).gamma, 2)
    (16.97, 6.94)

    References
    ----------
    T. Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2023,
    section 3.1, https://arxiv.org/abs/2312.02696
    """
    return Power(gamma_of(sigma_rel))


def sigma_rel_of(gamma: float) -> float:
    """Relative width of a power profile: ``sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)``.

    In (0, 0.2887]; it falls as gamma grows. An ArgumentError if gamma is not in [0, 1e100].
    """
    value = checked_gamma(gamma)
    return math.sqrt((value + 1.0) / (value + 3.0)) / (value + 2.0)


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the power profile of a relative width, the inverse of :func:`sigma_rel_of`.

    The largest root of ``(gamma + 2)**2 * (gamma + 3) = (gamma + 1) / sigma_rel**2``, to a few
    units in the last place of ``1 + gamma``.

    Parameters
    ----------
    sigma_rel : float
        From 1e-100 to 1/sqrt(12) = 0.2887, the uniform profile, gamma = 0; anything else is an
        ArgumentError.
    """
    width = checked_positive(sigma_rel, "sigma_rel")
    gamma = 1.0 / width
    if width > _WIDEST * (1 + 1e-15) or gamma > _STEEPEST:
        raise ArgumentError(
            f"sigma_rel={sigma_rel!r}: expected a number from 1e-100 to {_WIDEST:.4f}, the width "
            "of the profile as a share of the run; the paper's values are 0.05 and 0.10"
        )
    # Newton's method on the square root of the equation, which is convex, and close to a straight
    # line for a large gamma. It falls to the root from 1 / sigma_rel, which is always above.
    while True:
        ratio = width * (gamma + 2.0) * math.sqrt((gamma + 3.0) / (gamma + 1.0))
        slope = ratio * (1 / (gamma + 2.0) + 0.5 / (gamma + 3.0) - 0.5 / (gamma + 1.0))
        nearer = max(gamma - (ratio - 1.0) / slope, 0.0)
        if not nearer < gamma:
            return gamma
        gamma = nearer
