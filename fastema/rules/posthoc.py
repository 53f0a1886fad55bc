"""Averages chosen after the run: any profile, synthesized from snapshots.

The profile of an average at a step is how its weight is spread over the steps before, as a density
that integrates to 1. A sum of snapshots has the sum of their profiles, so the coefficients whose
sum comes nearest to the wanted profile give the wanted average, of any width and at any earlier
step, and the same for every tensor (T. Karras et al., Analyzing and Improving the Training Dynamics
of Diffusion Models, 2023, section 3.2, https://arxiv.org/abs/2312.02696).

Time is continuous and runs from 0 to the step of the average, in steps or in any other unit, the
same for all profiles. That is exact for averages that are updated at every k-th step, for any k:
the share of an update is the integral of the profile over the k steps before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fastema.errors import ArgumentError
from fastema.rules.checks import checked_least, checked_positive
from fastema.rules.power import checked_gamma, sigma_rel_of

__all__ = ["ExponentialProfile", "PowerProfile", "Profile", "Synthesis", "dot", "solve"]

Array = npt.NDArray[np.float64]

_MOST_HALVINGS = 1e100  # so that all products of densities are finite

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


@dataclass(frozen=True, slots=True)
class PowerProfile:
    """Profile of a power-function average, ``(gamma + 1) * s**gamma / step**(gamma + 1)``.

    Parameters
    ----------
    step : float
        When the average was taken, above 0.
    gamma : float
        The exponent, in [0, 1e100]; :func:`fastema.rules.gamma_of` gives it for a ``sigma_rel``.
    """

    step: float
    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", checked_positive(self.step, "step"))
        object.__setattr__(self, "gamma", checked_gamma(self.gamma))

    @property
    def sigma_rel(self) -> float:
        """Standard deviation of the profile divided by its step."""
        return sigma_rel_of(self.gamma)

    def density(self, times: npt.ArrayLike) -> Array:
        """``(gamma + 1) / step * (s / step)**gamma`` at some times; 0 outside ``[0, step]``."""
        part = np.asarray(times, np.float64) / self.step
        inside = (part >= 0) & (part <= 1)
        values = (self.gamma + 1) / self.step * np.where(inside, part, 0.0) ** self.gamma
        return np.where(inside, values, 0.0)


@dataclass(frozen=True, slots=True)
class ExponentialProfile:
    """Profile of an exponential average, ``2 ** (-(step - s) / half_life)``, normalised.

    It is exactly that of a bias-corrected average (:func:`fastema.rules.debiased`); one that is not
    corrected also keeps :attr:`initial_share` of the weights at step 0, which no density equals.

    Parameters
    ----------
    step : float
        When the average was taken, above 0.
    half_life : float
        In the unit of ``step``, above ``step / 1e100``; :mod:`fastema.rules.units` gives it for a
        decay.
    """

    step: float
    half_life: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", checked_positive(self.step, "step"))
        object.__setattr__(self, "half_life", checked_positive(self.half_life, "half_life"))
        if self.step > _MOST_HALVINGS * self.half_life:
            raise ArgumentError(
                f"half_life={self.half_life!r}: expected more than step={self.step!r} divided by "
                f"{_MOST_HALVINGS:g}"
            )

    @property
    def initial_share(self) -> float:
        """Share of the weights at step 0 in an average without bias correction."""
        return float(2.0 ** -(self.step / self.half_life))

    @property
    def rate(self) -> float:
        """``log(2) / half_life``."""
        return math.log(2.0) / self.half_life

    @property
    def peak(self) -> float:
        """Density at the step itself, ``rate / (1 - initial_share)``."""
        return self.rate / -math.expm1(-self.rate * self.step)

    def density(self, times: npt.ArrayLike) -> Array:
        """``peak * exp(-rate * (step - s))`` at some times; 0 outside ``[0, step]``."""
        age = self.step - np.asarray(times, np.float64)
        inside = (age >= 0) & (age <= self.step)
        return np.where(inside, self.peak * np.exp(-self.rate * np.where(inside, age, 0.0)), 0.0)


Profile: TypeAlias = PowerProfile | ExponentialProfile
"""Distribution of an average's weight at ``step`` over ``[0, step]``."""


@dataclass(frozen=True)
class Synthesis:
    """The result of :func:`solve`.

    Attributes
    ----------
    coefficients : tuple of float
        One for each snapshot, in their order; they sum to 1.
    error : float
        L2 distance of the synthesised profile from the target's, relative to the norm of that: the
        error of the average relative to its spread, if the weights were independent noise. Weights
        that move slowly are averaged far better. Below about 1e-7 it is rounding.
    """

    coefficients: tuple[float, ...]
    error: float


def _power_power(step: Array, gamma: Array, other_step: Array, other_gamma: Array) -> Array:
    """Dot products of power profiles, broadcast."""
    later = np.maximum(step, other_step)
    part = np.minimum(step, other_step) / later
    outer = np.where(step < other_step, other_gamma, gamma)  # that of the later one
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * part**outer / later


def _exponential_moment(gamma: float, rate: float) -> float:
    """``(gamma + 1) * integral of u**gamma * exp(-rate * (1 - u))`` over [0, 1].

    The confluent hypergeometric function 1F1(1; gamma + 2; -rate). With ``u = exp(-s)`` the
    integrand is smooth and falls from 1 at ``s = 0``, first like ``exp(-(rate + gamma + 1) * s)``,
    at last like ``exp(-(gamma + 1) * s)``: Gauss and Legendre on panels that double in length.
    """
    first, last = 4.0 / (rate + gamma + 1.0), 44.0 / (gamma + 1.0)
    panels = max(math.ceil(math.log2(last / first)), 1)
    edges = np.concatenate([[0.0], first * 2.0 ** np.arange(panels + 1)])
    half = np.diff(edges)[:, None] / 2
    s = edges[:-1, None] + half * (1 + _NODES)
    values = np.exp(rate * np.expm1(-s) - (gamma + 1.0) * s)
    return (gamma + 1.0) * float(np.sum(half * _WEIGHTS * values))


def _power_exponential(power: PowerProfile, other: ExponentialProfile) -> float:
    shared = min(power.step, other.step)
    inner = _exponential_moment(power.gamma, other.rate * shared)
    ends = math.exp(-other.rate * (other.step - shared))
    return other.peak * ends * float((shared / power.step) ** (power.gamma + 1)) * inner


def _exponential_exponential(one: ExponentialProfile, other: ExponentialProfile) -> float:
    shared = min(one.step, other.step)
    rate = one.rate + other.rate
    ends = math.exp(-one.rate * (one.step - shared) - other.rate * (other.step - shared))
    return one.peak * (other.peak / rate) * ends * -math.expm1(-rate * shared)


def dot(one: Profile, other: Profile) -> float:
    """Integral of the product of two profiles, per step; an ArgumentError for anything else.

    In closed form for two of a kind, by quadrature to a relative 1e-12 for two of different kinds.

    Examples
    --------
    >>> dot(PowerProfile(10, 0), PowerProfile(20, 0))  # 1/10 * 1/20, over 10 steps
    0.05
    """
    match one, other:
        case PowerProfile(), PowerProfile():
            return float(_products([one, other])[0, 1])
        case PowerProfile(), ExponentialProfile():
            return _power_exponential(one, other)
        case ExponentialProfile(), PowerProfile():
            return _power_exponential(other, one)
        case ExponentialProfile(), ExponentialProfile():
            return _exponential_exponential(one, other)
    raise _no_profile(other if isinstance(one, Profile) else one)


def _no_profile(found: object) -> ArgumentError:
    return ArgumentError(f"{found!r} is no profile; expected PowerProfile or ExponentialProfile")


def _products(profiles: Sequence[Profile]) -> Array:
    """All dot products, those of power profiles at once."""
    found = np.empty((len(profiles), len(profiles)))
    powers = [i for i, p in enumerate(profiles) if isinstance(p, PowerProfile)]
    pairs = [(p.step, p.gamma) for p in profiles if isinstance(p, PowerProfile)]
    step, gamma = np.array(pairs, np.float64).reshape(-1, 2).T
    found[np.ix_(powers, powers)] = _power_power(step[:, None], gamma[:, None], step, gamma)
    for i, profile in enumerate(profiles):
        if not isinstance(profile, PowerProfile):
            found[i] = found[:, i] = [dot(profile, other) for other in profiles]
    return found


def _checked(snapshots: Sequence[Profile], target: Profile) -> None:
    for profile in (*snapshots, target):
        if not isinstance(profile, Profile):
            raise _no_profile(profile)
    seen: dict[Profile, int] = {}
    for index, profile in enumerate(snapshots):
        first = seen.setdefault(profile, index)
        if first != index:
            raise ArgumentError(
                f"snapshots {first} and {index} have the same profile, {profile!r}; give one of "
                "them: their coefficients could not be told apart"
            )


def solve(snapshots: Sequence[Profile], target: Profile, *, noise: float = 1e-4) -> Synthesis:
    """Coefficients of snapshots whose sum has the profile nearest to a target's.

    Minimises ``|sum_i c_i * p_i - p|**2 / |p|**2 + noise**2 * sum_i c_i**2`` over the coefficients
    that sum to 1, in float64. With ``d_i = p_i - p`` the solution is proportional to
    ``(D + noise**2)**-1 * 1``, where D holds the dot products of the ``d_i``.

    Parameters
    ----------
    snapshots : sequence of Profile
        Of the averages that were kept. Those newer than the target get coefficient 0: they hold
        weights that it has not seen.
    target : Profile
        Of the average wanted, best at a step at which snapshots were taken: between two, the
        weights since the last one are missing, and count in the error.
    noise : float
        Cost of a coefficient of 1, at least 0: large ones magnify the rounding of the snapshots.
        For snapshots in 16 bits 1e-2 is reasonable.

    Raises
    ------
    ArgumentError
        If no snapshot is as old as the target or older, two have the same profile, or something is
        no profile.

    Examples
    --------
    >>> from fastema.rules import gamma_of
    >>> kept = [
    ...     PowerProfile(step, gamma_of(sigma_rel))
    ...     for step in range(1_000, 20_001, 1_000)
    ...     for sigma_rel in (0.05, 0.10)
    ... ]
    >>> found = solve(kept, PowerProfile(15_000, gamma_of(0.07)))
    >>> round(sum(found.coefficients), 9), found.error < 0.01
    (1.0, True)
    """
    _checked(snapshots, target)
    cost = checked_least(noise, "noise", 0.0) ** 2
    used = [i for i, snapshot in enumerate(snapshots) if snapshot.step <= target.step]
    if not used:
        steps = sorted({snapshot.step for snapshot in snapshots})
        oldest = f"the oldest is of step {steps[0]:g}" if steps else "there are none"
        raise ArgumentError(f"no snapshot at or before step {target.step:g}: {oldest}")
    coefficients = np.zeros(len(snapshots))
    if target in snapshots:
        coefficients[snapshots.index(target)] = 1.0
        return Synthesis(tuple(coefficients.tolist()), 0.0)

    products = _products([*(snapshots[i] for i in used), target])
    products /= products[-1, -1]
    distances = products[:-1, :-1] - products[:-1, -1:] - products[-1:, :-1] + 1.0
    found = _normalised(distances + cost * np.eye(len(used)))
    coefficients[used] = found
    return Synthesis(
        tuple(coefficients.tolist()), math.sqrt(max(float(found @ distances @ found), 0.0))
    )


def _normalised(matrix: Array) -> Array:
    """The vector that sums to 1 and makes ``c @ matrix @ c`` smallest."""
    # Early snapshots have a far greater norm than late ones; on a diagonal of ones rounding is the
    # same for all. Eigenvalues below it say nothing, and must not be divided by.
    rounding = float(np.finfo(np.float64).eps)
    scale = 1.0 / np.sqrt(np.maximum(matrix.diagonal(), rounding))
    values, vectors = np.linalg.eigh(matrix * scale[:, None] * scale)
    floor = len(matrix) * rounding
    found = scale * (vectors @ ((vectors.T @ scale) / np.maximum(values, floor)))
    return np.asarray(found / found.sum())
