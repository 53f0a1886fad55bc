"""Averages chosen after the run: any profile, synthesized from snapshots.

The profile of an average is the density of its weight over the earlier steps; it integrates to 1. A
linear combination of snapshots has the same combination of their profiles. So the coefficients that
best approximate a target profile also give the target average, of any width and at any earlier
step. They are the same for every tensor (T. Karras et al., Analyzing and Improving the Training
Dynamics of Diffusion Models, 2023, section 3.2, https://arxiv.org/abs/2312.02696).

Time is continuous and runs from 0 to the step of the average. Its unit is a step or anything else,
but must be the same for all profiles. Continuous time is exact for averages that are updated at
every k-th step, for any k: the share of an update is the integral of the profile over the k steps
before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fastema.errors import ArgumentError
from fastema.rules.checks import validate_at_least, validate_positive
from fastema.rules.power import sigma_rel_of, validate_gamma

__all__ = ["ExponentialProfile", "PowerProfile", "Profile", "Synthesis", "dot", "solve"]

Array = npt.NDArray[np.float64]

_MOST_HALVINGS = 1e100  # keeps all products of densities finite

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


@dataclass(frozen=True, slots=True)
class PowerProfile:
    """Profile of a power-function average, ``(gamma + 1) * s**gamma / step**(gamma + 1)``.

    Parameters
    ----------
    step : float
        Step of the average, above 0.
    gamma : float
        Exponent, in [0, 1e100]; :func:`fastema.rules.gamma_of` converts a ``sigma_rel``.

    Raises
    ------
    ArgumentError
        If a number is out of range.
    """

    step: float
    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", validate_positive(self.step, "step"))
        object.__setattr__(self, "gamma", validate_gamma(self.gamma))

    @property
    def sigma_rel(self) -> float:
        """Standard deviation of the profile divided by its step."""
        return sigma_rel_of(self.gamma)

    def density(self, times: npt.ArrayLike) -> Array:
        """Return ``(gamma + 1) / step * (s / step)**gamma`` at ``times``; 0 outside [0, step]."""
        part = np.asarray(times, np.float64) / self.step
        inside = (part >= 0) & (part <= 1)
        values = (self.gamma + 1) / self.step * np.where(inside, part, 0.0) ** self.gamma
        return np.where(inside, values, 0.0)


@dataclass(frozen=True, slots=True)
class ExponentialProfile:
    """Profile of an exponential average, ``2 ** (-(step - s) / half_life)``, normalized.

    The profile is exact for a bias-corrected average (:func:`fastema.rules.debiased`). Without bias
    correction an average also keeps :attr:`initial_share` of the weights at step 0, which a density
    cannot represent.

    Parameters
    ----------
    step : float
        Step of the average, above 0.
    half_life : float
        In the unit of ``step``, above ``step / 1e100``; :mod:`fastema.rules.units` converts a
        decay.

    Raises
    ------
    ArgumentError
        If a number is out of range.
    """

    step: float
    half_life: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", validate_positive(self.step, "step"))
        object.__setattr__(self, "half_life", validate_positive(self.half_life, "half_life"))
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
        """Decay rate, ``log(2) / half_life``."""
        return math.log(2.0) / self.half_life

    @property
    def peak(self) -> float:
        """Density at ``step``, ``rate / (1 - initial_share)``."""
        return self.rate / -math.expm1(-self.rate * self.step)

    def density(self, times: npt.ArrayLike) -> Array:
        """Return ``peak * exp(-rate * (step - s))`` at ``times``; 0 outside [0, step]."""
        age = self.step - np.asarray(times, np.float64)
        inside = (age >= 0) & (age <= self.step)
        return np.where(inside, self.peak * np.exp(-self.rate * np.where(inside, age, 0.0)), 0.0)


Profile: TypeAlias = PowerProfile | ExponentialProfile
"""How the weight of an average at ``step`` is distributed over ``[0, step]``."""


@dataclass(frozen=True)
class Synthesis:
    """The result of :func:`solve`.

    Attributes
    ----------
    coefficients : tuple of float
        One per snapshot, in the order of the snapshots; they sum to 1.
    error : float
        L2 distance between the synthesized profile and the target, relative to the norm of the
        target. If the weights were independent noise, it would be the error of the average relative
        to its spread. Weights that move slowly are averaged far better. Values below about 1e-7 are
        rounding errors.
    """

    coefficients: tuple[float, ...]
    error: float


def _power_power(step: Array, gamma: Array, other_step: Array, other_gamma: Array) -> Array:
    """Return the dot products of power profiles; the arguments broadcast."""
    later = np.maximum(step, other_step)
    part = np.minimum(step, other_step) / later
    outer = np.where(step < other_step, other_gamma, gamma)  # exponent of the later profile
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * part**outer / later


def _exponential_moment(gamma: float, rate: float) -> float:
    """Return ``(gamma + 1) * integral of u**gamma * exp(-rate * (1 - u))`` over [0, 1].

    This is the confluent hypergeometric function 1F1(1; gamma + 2; -rate). With ``u = exp(-s)`` the
    integrand is smooth and falls from 1 at ``s = 0``, first like ``exp(-(rate + gamma + 1) * s)``,
    finally like ``exp(-(gamma + 1) * s)``. Gauss-Legendre quadrature on panels that double in
    length fits this shape.
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
    """Return the integral of the product of two profiles, in units of 1 / step.

    Two profiles of the same class have a closed form; for two different classes, quadrature gives a
    relative error of 1e-12. Raise an ArgumentError for an argument that is not a profile.

    Examples
    --------
    >>> dot(PowerProfile(10, 0), PowerProfile(20, 0))  # 1/10 * 1/20, over 10 steps
    0.05
    """
    match one, other:
        case PowerProfile(), PowerProfile():
            return float(_compute_dot_products([one, other])[0, 1])
        case PowerProfile(), ExponentialProfile():
            return _power_exponential(one, other)
        case ExponentialProfile(), PowerProfile():
            return _power_exponential(other, one)
        case ExponentialProfile(), ExponentialProfile():
            return _exponential_exponential(one, other)
    raise _no_profile(other if isinstance(one, Profile) else one)


def _no_profile(found: object) -> ArgumentError:
    return ArgumentError(f"{found!r} is not a profile: expected PowerProfile or ExponentialProfile")


def _compute_dot_products(profiles: Sequence[Profile]) -> Array:
    """Return the matrix of all dot products. Products of power profiles are vectorized."""
    found = np.empty((len(profiles), len(profiles)))
    powers = [i for i, p in enumerate(profiles) if isinstance(p, PowerProfile)]
    pairs = [(p.step, p.gamma) for p in profiles if isinstance(p, PowerProfile)]
    step, gamma = np.array(pairs, np.float64).reshape(-1, 2).T
    found[np.ix_(powers, powers)] = _power_power(step[:, None], gamma[:, None], step, gamma)
    for i, profile in enumerate(profiles):
        if not isinstance(profile, PowerProfile):
            found[i] = found[:, i] = [dot(profile, other) for other in profiles]
    return found


def _validate_profiles(snapshots: Sequence[Profile], target: Profile) -> None:
    for profile in (*snapshots, target):
        if not isinstance(profile, Profile):
            raise _no_profile(profile)
    seen: dict[Profile, int] = {}
    for index, profile in enumerate(snapshots):
        first = seen.setdefault(profile, index)
        if first != index:
            raise ArgumentError(
                f"snapshots {first} and {index} have the same profile, {profile!r}; pass only one "
                "of them: their coefficients would not be unique"
            )


def solve(snapshots: Sequence[Profile], target: Profile, *, noise: float = 1e-4) -> Synthesis:
    """Return the coefficients of snapshots whose combined profile is closest to ``target``.

    Minimize ``|sum_i c_i * p_i - p|**2 / |p|**2 + noise**2 * sum_i c_i**2`` over coefficients that
    sum to 1, in float64. With ``d_i = p_i - p`` the solution is proportional to
    ``(D + noise**2)**-1 * 1``, where D holds the dot products of the ``d_i``.

    Parameters
    ----------
    snapshots : sequence of Profile
        Profiles of the saved averages. Snapshots newer than the target get coefficient 0, since
        they contain weights that the target does not.
    target : Profile
        Profile of the average to synthesize, preferably at the step of a snapshot. At a step
        between two snapshots, the weights since the earlier one are missing, which counts in the
        error.
    noise : float
        Strength of the penalty on coefficients, at least 0; 1e-4 by default. Large coefficients
        magnify the rounding errors of the snapshots; 1e-2 is reasonable for 16-bit snapshots.

    Returns
    -------
    Synthesis
        The coefficients and the error.

    Raises
    ------
    ArgumentError
        If every snapshot is newer than the target, two snapshots have the same profile, an argument
        is not a profile, or ``noise`` is out of range.

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
    _validate_profiles(snapshots, target)
    cost = validate_at_least(noise, "noise", 0.0) ** 2
    used = [i for i, snapshot in enumerate(snapshots) if snapshot.step <= target.step]
    if not used:
        steps = sorted({snapshot.step for snapshot in snapshots})
        oldest = f"the oldest is at step {steps[0]:g}" if steps else "there are none"
        raise ArgumentError(f"no snapshot at or before step {target.step:g}: {oldest}")
    coefficients = np.zeros(len(snapshots))
    if target in snapshots:
        coefficients[snapshots.index(target)] = 1.0
        return Synthesis(tuple(coefficients.tolist()), 0.0)

    products = _compute_dot_products([*(snapshots[i] for i in used), target])
    products /= products[-1, -1]
    distances = products[:-1, :-1] - products[:-1, -1:] - products[-1:, :-1] + 1.0
    found = _minimize_quadratic(distances + cost * np.eye(len(used)))
    coefficients[used] = found
    return Synthesis(
        tuple(coefficients.tolist()), math.sqrt(max(float(found @ distances @ found), 0.0))
    )


def _minimize_quadratic(matrix: Array) -> Array:
    """Return the vector that minimizes ``c @ matrix @ c`` and sums to 1."""
    # Early snapshots have a far greater norm than late ones: scale the diagonal to 1, so that
    # rounding affects all alike. Eigenvalues below the rounding error are noise: clamp them.
    rounding = float(np.finfo(np.float64).eps)
    scale = 1.0 / np.sqrt(np.maximum(matrix.diagonal(), rounding))
    values, vectors = np.linalg.eigh(matrix * scale[:, None] * scale)
    floor = len(matrix) * rounding
    found = scale * (vectors @ ((vectors.T @ scale) / np.maximum(values, floor)))
    return np.asarray(found / found.sum())
