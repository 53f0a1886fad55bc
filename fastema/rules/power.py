"""Averages whose memory grows with the run: each step is weighted by a power of its number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastema.errors import ArgumentError
from fastema.rules.checks import validate_at_least, validate_positive
from fastema.rules.rule import Rule

__all__ = ["Power", "gamma_of", "power", "sigma_rel_of", "validate_gamma"]

_WIDEST = 1 / math.sqrt(12)  # sigma_rel of the uniform profile, gamma = 0
_STEEPEST = 1e100  # keeps products of two exponents finite


def validate_gamma(gamma: Any) -> float:
    """Return ``gamma`` as a float; raise an ArgumentError unless it is in [0, 1e100]."""
    value = validate_at_least(gamma, "gamma", 0.0)
    if value > _STEEPEST:
        raise ArgumentError(f"gamma={gamma!r}: expected at most {_STEEPEST:g}")
    return value


@dataclass(frozen=True, slots=True)
class Power(Rule):
    """Rule of an average that weights step ``s`` in proportion to ``s**gamma``.

    For ``every`` steps the decay is ``(1 - every/n) ** (gamma + 1)``. The share of step ``s`` in
    the average at ``n`` is then exactly ``(s/n)**(gamma+1) - ((s-every)/n)**(gamma+1)``, the
    integral of the profile over these steps. The first update copies the weights.

    Parameters
    ----------
    gamma : float
        Exponent, in [0, 1e100]; ``gamma = 0`` is the cumulative mean. :func:`power` takes the
        relative width instead, and names the reference. (Profiles with ``-1 < gamma < 0`` are not
        supported: they favor the oldest weights, and their ``sigma_rel`` is not unique.)

    Raises
    ------
    ArgumentError
        If ``gamma`` is out of range.
    """

    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", validate_gamma(self.gamma))

    @property
    def sigma_rel(self) -> float:
        """Standard deviation of the profile divided by the number of steps so far."""
        return sigma_rel_of(self.gamma)

    def decay(self, n: int) -> float:
        """Return ``(1 - 1/n) ** (gamma + 1)``."""
        return float((1.0 - 1.0 / n) ** (self.gamma + 1.0))

    def weight(self, n: int, every: int = 1) -> float:
        """Return ``1 - (1 - every/n) ** (gamma + 1)``."""
        if n <= every:
            return 1.0
        return -math.expm1((self.gamma + 1.0) * math.log1p(-every / n))


def power(sigma_rel: float = 0.05) -> Power:
    """Return the rule of the power-function average with a relative width, the EMA of EDM2.

    The average at step ``n`` looks back by about ``n * sigma_rel`` steps: the shape of its profile
    stays the same and stretches with the run. Snapshots of two such averages are enough to
    synthesize any other width after the run (:mod:`fastema.rules.posthoc`).

    Parameters
    ----------
    sigma_rel : float
        Standard deviation of the profile divided by the steps so far, from 1e-100 to
        1/sqrt(12) = 0.2887; 0.05 by default. The paper uses 0.05 and 0.10.

    Raises
    ------
    ArgumentError
        If ``sigma_rel`` is out of range.

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
    """Return a power profile's relative width, ``sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)``.

    The width is in (0, 0.2887] and falls as ``gamma`` grows. Raise an ArgumentError unless
    ``gamma`` is in [0, 1e100].
    """
    value = validate_gamma(gamma)
    return math.sqrt((value + 1.0) / (value + 3.0)) / (value + 2.0)


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the power profile with width ``sigma_rel``; see :func:`sigma_rel_of`.

    The result is the largest root of ``(gamma + 2)**2 * (gamma + 3) = (gamma + 1) / sigma_rel**2``,
    accurate to a few units in the last place of ``1 + gamma``.

    Parameters
    ----------
    sigma_rel : float
        From 1e-100 to 1/sqrt(12) = 0.2887, the width of the uniform profile (gamma = 0).

    Raises
    ------
    ArgumentError
        If ``sigma_rel`` is out of range.
    """
    width = validate_positive(sigma_rel, "sigma_rel")
    gamma = 1.0 / width
    if width > _WIDEST * (1 + 1e-15) or gamma > _STEEPEST:
        raise ArgumentError(
            f"sigma_rel={sigma_rel!r}: expected a number from 1e-100 to {_WIDEST:.4f}, the width "
            "of the profile as a share of the run; the paper's values are 0.05 and 0.10"
        )
    # Newton's method on the square root of the equation, which is convex and nearly linear for a
    # large gamma. It decreases monotonically from 1 / sigma_rel, which is always above the root.
    while True:
        ratio = width * (gamma + 2.0) * math.sqrt((gamma + 3.0) / (gamma + 1.0))
        slope = ratio * (1 / (gamma + 2.0) + 0.5 / (gamma + 3.0) - 0.5 / (gamma + 1.0))
        nearer = max(gamma - (ratio - 1.0) / slope, 0.0)
        if not nearer < gamma:
            return gamma
        gamma = nearer
