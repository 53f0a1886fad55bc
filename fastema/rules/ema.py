"""Exponential moving averages: constant decay, and decays that grow early in a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastema.errors import ArgumentError
from fastema.rules.checks import (
    validate_at_least,
    validate_decay,
    validate_int,
    validate_positive,
)
from fastema.rules.rule import Rule

__all__ = [
    "Aligned",
    "Constant",
    "HalfLifeFraction",
    "InverseGamma",
    "Warmup",
    "constant",
    "half_life",
    "half_life_fraction",
    "inverse_gamma",
    "warmup",
]


@dataclass(frozen=True, slots=True)
class Constant(Rule):
    """Constant decay; see :func:`constant`."""

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", validate_decay(self.value))

    def decay(self, n: int) -> float:
        """Return the constant decay."""
        return self.value


@dataclass(frozen=True)
class Aligned(Constant):
    """Constant decay whose updates fall on fixed steps, to match how some trainers count.

    Parameters
    ----------
    value : float
        Decay per step, in [0, 1).
    phase : int
        At least 0, default 0. With ``update_every=k``, steps ``phase``, ``phase + k``,
        ``phase + 2 * k``, ... update the average, whatever ``start_after`` is. Every update has the
        weight of k steps, even the first one, when fewer steps have passed.
    """

    phase: int = 0  # type: ignore[misc]  # an instance attribute; Rule has a class variable

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "phase", validate_int(self.phase, "phase", 0))


@dataclass(frozen=True, slots=True)
class Warmup(Rule):
    """Growing decay with a limit; see :func:`warmup`."""

    limit: float
    offset: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", validate_decay(self.limit))
        object.__setattr__(self, "offset", validate_at_least(self.offset, "offset", 1))

    def decay(self, n: int) -> float:
        """Return ``min(limit, (1 + n) / (offset + n))``."""
        return min(self.limit, (1 + n) / (self.offset + n))


@dataclass(frozen=True, slots=True)
class InverseGamma(Rule):
    """Decay that grows by an inverse power of the step; see :func:`inverse_gamma`."""

    limit: float
    inv_gamma: float
    power: float
    minimum: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", validate_decay(self.limit))
        object.__setattr__(self, "minimum", validate_decay(self.minimum, "minimum"))
        object.__setattr__(self, "inv_gamma", validate_positive(self.inv_gamma, "inv_gamma"))
        object.__setattr__(self, "power", validate_positive(self.power, "power"))
        if self.minimum > self.limit:
            raise ArgumentError(f"minimum={self.minimum} is above decay={self.limit}")

    def decay(self, n: int) -> float:
        """Return ``1 - (1 + (n - 1) / inv_gamma) ** -power``, clamped to [minimum, limit]."""
        grown = 1.0 - float((1 + (n - 1) / self.inv_gamma) ** -self.power)
        return max(self.minimum, min(grown, self.limit))


@dataclass(frozen=True, slots=True)
class HalfLifeFraction(Rule):
    """Half-life proportional to the step; see :func:`half_life_fraction`."""

    fraction: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "fraction", validate_positive(self.fraction, "fraction"))

    def decay(self, n: int) -> float:
        """Return ``2 ** (-1 / (fraction * n))``."""
        return float(2.0 ** (-1.0 / (self.fraction * n)))

    def weight(self, n: int, every: int = 1) -> float:
        """Return one minus the product of the decays of the ``every`` steps up to ``n``."""
        half_lives = _harmonic(max(n - every, 0), n) / self.fraction
        return -math.expm1(-math.log(2.0) * half_lives)


_SUMMED = 64
"""The number of reciprocals that are added one by one, before a series takes over."""


def _harmonic(begin: int, end: int) -> float:
    """Return ``1 / (begin + 1) + ... + 1 / end``, accurate to the last digits."""
    first = min(end, begin + _SUMMED)
    found = math.fsum(1.0 / i for i in range(begin + 1, first + 1))
    if first == end:
        return found
    return found + math.log(end / first) + _remainder(end) - _remainder(first)


def _remainder(n: int) -> float:
    """Return ``1 + 1/2 + ... + 1/n`` minus ``ln n`` and Euler's constant, for n of at least 64."""
    square = float(n) * n
    return 0.5 / n - 1.0 / (12.0 * square) + 1.0 / (120.0 * square * square)


def constant(decay: float = 0.999) -> Constant:
    """Return the rule with the same decay at every step: an exponential moving average.

    ``avg_n = decay * avg_(n-1) + (1 - decay) * x_n``, in closed form
    ``decay**n * avg_0 + (1 - decay) * sum_k decay**(n-k) * x_k``. It averages over about
    ``1 / (1 - decay)`` steps; :mod:`fastema.rules.units` converts to other units.

    Parameters
    ----------
    decay : float
        Weight of the old average, in [0, 1); 0.999 by default.

    Raises
    ------
    ArgumentError
        If ``decay`` is out of range.

    Examples
    --------
    >>> constant(0.9).decay(1000)
    0.9
    """
    return Constant(decay)


def warmup(decay: float = 0.999, offset: float = 10.0) -> Warmup:
    """Return the rule ``min(decay, (1 + n) / (offset + n))``, which soon forgets early weights.

    With the default offset the decay is 2/11 at step 1, and reaches 0.999 at step 8,990. This is
    the schedule of torch_ema, and of ``tf.train.ExponentialMovingAverage`` with ``num_updates``.

    Parameters
    ----------
    decay : float
        The largest decay, in [0, 1); 0.999 by default.
    offset : float
        At least 1; 10 by default. A larger one makes the decay grow more slowly: it reaches
        ``decay`` at about ``(offset - 1) / (1 - decay)`` steps. This is d2go's
        ``decay_warm_up_factor``.

    Raises
    ------
    ArgumentError
        If an argument is out of range.

    Examples
    --------
    >>> [round(warmup(0.999).decay(n), 3) for n in (1, 10, 100, 10_000)]
    [0.182, 0.55, 0.918, 0.999]
    """
    return Warmup(decay, offset)


def inverse_gamma(
    decay: float = 0.9999, inv_gamma: float = 1.0, power: float = 2 / 3, minimum: float = 0.0
) -> InverseGamma:
    """Return a rule that grows as ``1 - (1 + (n - 1) / inv_gamma) ** -power`` up to ``decay``.

    Step 1 copies the weights, unless ``minimum`` is above 0. With ``inv_gamma = power = 1`` the
    average is the running mean. Power 2/3 reaches 0.999 at step 31,623, power 3/4 at 10,000. This
    is the warm-up of timm, diffusers and ema_pytorch, after K. Crowson.

    Parameters
    ----------
    decay : float
        The largest decay, in [0, 1); 0.9999 by default.
    inv_gamma : float
        Time scale of the growth in steps, above 0; 1 by default. Larger values grow later.
    power : float
        Exponent of the growth, above 0; 2/3 by default.
    minimum : float
        The smallest decay, in [0, decay]; 0 by default.

    Raises
    ------
    ArgumentError
        If an argument is out of range.

    Examples
    --------
    >>> inverse_gamma(power=1.0).decay(4)  # the mean of four
    0.75
    """
    return InverseGamma(decay, inv_gamma, power, minimum)


def half_life_fraction(fraction: float = 0.05) -> HalfLifeFraction:
    """Return the rule ``2 ** (-1 / (fraction * n))``: the half-life grows with the run.

    The average looks back over the same fraction of a run of any length, so a longer run needs no
    other setting. It is nearly the power-function average with ``gamma = ln 2 / fraction - 1``;
    ``fraction = 0.05`` has a relative width of 0.063. This is the default of torchtitan.

    Parameters
    ----------
    fraction : float
        Half-life divided by the step, above 0; 0.05 by default.

    Raises
    ------
    ArgumentError
        If ``fraction`` is out of range.

    References
    ----------
    https://arxiv.org/abs/2602.03702

    Examples
    --------
    >>> rule = half_life_fraction(0.05)
    >>> rule.decay(1000) == half_life(50).decay(1)
    True
    """
    return HalfLifeFraction(fraction)


def half_life(steps: float) -> Constant:
    """Return the constant rule that halves a weight in ``steps``: ``2 ** (-1 / steps)``.

    Parameters
    ----------
    steps : float
        Half-life in steps, above 0. For a half-life in samples or tokens see
        :func:`fastema.rules.units.decay_of_half_life`.

    Raises
    ------
    ArgumentError
        If ``steps`` is out of range, or so large that the decay rounds to 1.

    Examples
    --------
    >>> round(half_life(693).decay(1), 4)
    0.999
    """
    return Constant(2.0 ** (-1.0 / validate_positive(steps, "steps")))
