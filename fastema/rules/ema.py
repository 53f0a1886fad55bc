"""Exponential moving averages: a constant decay, and decays that grow while a run begins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastema.errors import ArgumentError
from fastema.rules.checks import checked_decay, checked_positive, checked_whole
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
    """See :func:`constant`."""

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", checked_decay(self.value))

    def decay(self, n: int) -> float:
        """The same at every step."""
        return self.value


@dataclass(frozen=True)
class Aligned(Constant):
    """A constant decay whose updates fall on given steps, as some trainers count them.

    Parameters
    ----------
    value : float
        Decay per step, in [0, 1).
    phase : int
        At least 0: with ``update_every=k``, steps ``phase``, ``phase + k``, ``phase + 2 * k``, ...
        update the average, wherever ``start_after`` lets it begin. Each has the weight of k steps,
        also the first after the beginning, where fewer have passed.
    """

    phase: int = 0  # type: ignore[misc]  # of an instance, where Rule has one of the class

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "phase", checked_whole(self.phase, "phase", 0))


@dataclass(frozen=True, slots=True)
class Warmup(Rule):
    """See :func:`warmup`."""

    limit: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", checked_decay(self.limit))

    def decay(self, n: int) -> float:
        """``min(limit, (1 + n) / (10 + n))``."""
        return min(self.limit, (1 + n) / (10 + n))


@dataclass(frozen=True, slots=True)
class InverseGamma(Rule):
    """See :func:`inverse_gamma`."""

    limit: float
    inv_gamma: float
    power: float
    minimum: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", checked_decay(self.limit))
        object.__setattr__(self, "minimum", checked_decay(self.minimum, "minimum"))
        object.__setattr__(self, "inv_gamma", checked_positive(self.inv_gamma, "inv_gamma"))
        object.__setattr__(self, "power", checked_positive(self.power, "power"))
        if self.minimum > self.limit:
            raise ArgumentError(f"minimum={self.minimum} is above decay={self.limit}")

    def decay(self, n: int) -> float:
        """``1 - (1 + (n - 1) / inv_gamma) ** -power``, between ``minimum`` and ``limit``."""
        grown = 1.0 - float((1 + (n - 1) / self.inv_gamma) ** -self.power)
        return max(self.minimum, min(grown, self.limit))


@dataclass(frozen=True, slots=True)
class HalfLifeFraction(Rule):
    """See :func:`half_life_fraction`."""

    fraction: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "fraction", checked_positive(self.fraction, "fraction"))

    def decay(self, n: int) -> float:
        """``2 ** (-1 / (fraction * n))``."""
        return float(2.0 ** (-1.0 / (self.fraction * n)))

    def weight(self, n: int, every: int = 1) -> float:
        """One minus the product of the decays of the ``every`` steps up to ``n``."""
        half_lives = _harmonic(max(n - every, 0), n) / self.fraction
        return -math.expm1(-math.log(2.0) * half_lives)


_SUMMED = 64
"""Up to so many reciprocals are added one by one."""


def _harmonic(begin: int, end: int) -> float:
    """``1 / (begin + 1) + ... + 1 / end``, to the last digits."""
    first = min(end, begin + _SUMMED)
    found = math.fsum(1.0 / i for i in range(begin + 1, first + 1))
    if first == end:
        return found
    return found + math.log(end / first) + _remainder(end) - _remainder(first)


def _remainder(n: int) -> float:
    """``1 + 1/2 + ... + 1/n`` beyond ``ln n`` and Euler's constant, for n of at least 64."""
    square = float(n) * n
    return 0.5 / n - 1.0 / (12.0 * square) + 1.0 / (120.0 * square * square)


def constant(decay: float = 0.999) -> Constant:
    """The same decay at every step.

    ``avg_n = decay * avg_(n-1) + (1 - decay) * x_n``, in closed form
    ``decay**n * avg_0 + (1 - decay) * sum_k decay**(n-k) * x_k``. It averages over about
    ``1 / (1 - decay)`` steps; :mod:`fastema.rules.units` converts.

    Parameters
    ----------
    decay : float
        In [0, 1).

    Examples
    --------
    >>> constant(0.9).decay(1000)
    0.9
    """
    return Constant(decay)


def warmup(decay: float = 0.999) -> Warmup:
    """A decay that grows as ``min(decay, (1 + n) / (10 + n))``: early weights are soon forgotten.

    Step 1 has decay 2/11; ``decay = 0.999`` is reached at step 8,990. The schedule of
    ``tf.train.ExponentialMovingAverage`` with ``num_updates`` and of torch_ema.

    Parameters
    ----------
    decay : float
        The limit, in [0, 1).

    Examples
    --------
    >>> [round(warmup(0.999).decay(n), 3) for n in (1, 10, 100, 10_000)]
    [0.182, 0.55, 0.918, 0.999]
    """
    return Warmup(decay)


def inverse_gamma(
    decay: float = 0.9999, inv_gamma: float = 1.0, power: float = 2 / 3, minimum: float = 0.0
) -> InverseGamma:
    """A decay that grows as ``1 - (1 + (n - 1) / inv_gamma) ** -power`` up to ``decay``.

    Step 1 copies the weights. With ``inv_gamma = power = 1`` it is the running mean. Power 2/3
    reaches 0.999 at step 31,623, power 3/4 at 10,000. The warm-up of timm, diffusers and
    ema_pytorch, after K. Crowson.

    Parameters
    ----------
    decay : float
        The upper limit, in [0, 1).
    inv_gamma : float
        Steps after which the growth sets in, above 0.
    power : float
        Its exponent, above 0.
    minimum : float
        The lower limit, in [0, decay].

    Examples
    --------
    >>> inverse_gamma(power=1.0).decay(4)  # the mean of four
    0.75
    """
    return InverseGamma(decay, inv_gamma, power, minimum)


def half_life_fraction(fraction: float = 0.05) -> HalfLifeFraction:
    """A half-life that is a share of the run so far: ``decay(n) = 2 ** (-1 / (fraction * n))``.

    The average looks back over the same share of the run at any length, so that a
    longer run needs no other setting. Nearly the power-function average with
    ``gamma = ln 2 / fraction - 1``; ``fraction = 0.05`` has a relative width of
    0.063. The default of torchtitan.

    Parameters
    ----------
    fraction : float
        Above 0.

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
    """The constant decay that halves a weight in this many steps, ``2 ** (-1 / steps)``.

    Parameters
    ----------
    steps : float
        Above 0. For samples or tokens see :func:`fastema.rules.units.decay_of_half_life`.

    Examples
    --------
    >>> round(half_life(693).decay(1), 4)
    0.999
    """
    return Constant(2.0 ** (-1.0 / checked_positive(steps, "steps")))
