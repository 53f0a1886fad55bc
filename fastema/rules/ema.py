"""Decay schedules of exponential moving averages.

A rule maps the number ``n`` of an update, counted from 1, to the weight of the new value,
``w(n) = 1 - decay(n)``; the average then does ``avg += w(n) * (x - avg)``. ``decay`` is always the
weight of the *old* average (what mmengine and optax call momentum or step size is ``w``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from fastema.errors import ArgumentError

__all__ = [
    "Constant",
    "InverseGamma",
    "Rule",
    "Warmup",
    "constant",
    "half_life",
    "inverse_gamma",
    "rule_from_dict",
    "warmup",
]


@runtime_checkable
class Rule(Protocol):
    """What a schedule needs of a rule: pure functions of the update's number."""

    def decay(self, n: int) -> float:
        """Weight of the old average in update ``n`` (from 1), in [0, 1]."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that :func:`rule_from_dict` rebuilds the rule from."""


def checked_decay(decay: Any, name: str = "decay") -> float:
    """A decay as a float in [0, 1).

    Raises
    ------
    ArgumentError
        For anything else.
    """
    number = isinstance(decay, Real) and not isinstance(decay, bool)
    value = float(decay) if number else math.nan
    if not 0.0 <= value < 1.0:
        raise ArgumentError(
            f"{name}={decay!r}: expected a number in [0, 1); it is the weight of the old average, "
            "for example 0.999"
        )
    return value


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentError(f"{name}={value!r}: expected a number above 0")
    if not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"{name}={value!r}: expected a finite number above 0")
    return float(value)


class _Described:
    """Plain values in and out, for checkpoints."""

    def to_dict(self) -> dict[str, Any]:
        """The rule's name and parameters."""
        return {"rule": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class Constant(_Described):
    """See :func:`constant`."""

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", checked_decay(self.value))

    def decay(self, n: int) -> float:
        """The same at every update."""
        return self.value


@dataclass(frozen=True, slots=True)
class Warmup(_Described):
    """See :func:`warmup`."""

    limit: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", checked_decay(self.limit))

    def decay(self, n: int) -> float:
        """``min(limit, (1 + n) / (10 + n))``."""
        return min(self.limit, (1 + n) / (10 + n))


@dataclass(frozen=True, slots=True)
class InverseGamma(_Described):
    """See :func:`inverse_gamma`."""

    limit: float
    inv_gamma: float
    power: float
    minimum: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", checked_decay(self.limit))
        object.__setattr__(self, "minimum", checked_decay(self.minimum, "minimum"))
        object.__setattr__(self, "inv_gamma", _positive(self.inv_gamma, "inv_gamma"))
        object.__setattr__(self, "power", _positive(self.power, "power"))
        if self.minimum > self.limit:
            raise ArgumentError(f"minimum={self.minimum} is above decay={self.limit}")

    def decay(self, n: int) -> float:
        """``1 - (1 + (n - 1) / inv_gamma) ** -power``, between ``minimum`` and ``limit``."""
        grown = 1.0 - float((1 + (n - 1) / self.inv_gamma) ** -self.power)
        return max(self.minimum, min(grown, self.limit))


def constant(decay: float = 0.999) -> Constant:
    """The same decay at every update.

    ``avg_n = decay * avg_(n-1) + (1 - decay) * x_n``, in closed form
    ``decay**n * avg_0 + (1 - decay) * sum_k decay**(n-k) * x_k``. It averages over about
    ``1 / (1 - decay)`` updates.

    Parameters
    ----------
    decay : float
        In [0, 1).

    Examples
    --------
    >>> constant(0.9).decay(1), constant(0.9).decay(1000)
    (0.9, 0.9)
    """
    return Constant(decay)


def warmup(decay: float = 0.999) -> Warmup:
    """A decay that grows as ``min(decay, (1 + n) / (10 + n))``: early weights are soon forgotten.

    Update 1 has decay 2/11; ``decay = 0.999`` is reached at update 8,990. The schedule of
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

    Update 1 copies the weights. With ``inv_gamma = power = 1`` it is the running mean. Power 2/3
    reaches 0.999 at update 31,623, power 3/4 at 10,000. The warm-up of timm, diffusers and
    ema_pytorch, after K. Crowson.

    Parameters
    ----------
    decay : float
        The upper limit, in [0, 1).
    inv_gamma : float
        Updates after which the growth sets in, above 0.
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


def half_life(updates: float) -> Constant:
    """The constant decay that halves a weight in this many updates, ``2 ** (-1 / updates)``.

    Parameters
    ----------
    updates : float
        Above 0.

    Examples
    --------
    >>> round(half_life(693).decay(1), 4)
    0.999
    """
    return Constant(2.0 ** (-1.0 / _positive(updates, "updates")))


_RULES = {rule.__name__: rule for rule in (Constant, Warmup, InverseGamma)}


def rule_from_dict(plain: Mapping[str, Any]) -> Rule:
    """The rule that :meth:`Rule.to_dict` described.

    Raises
    ------
    ArgumentError
        For an unknown rule or wrong parameters.
    """
    values = dict(plain) if isinstance(plain, Mapping) else {}
    name = values.pop("rule", None)
    if not isinstance(name, str) or name not in _RULES:
        raise ArgumentError(f"unknown rule {name!r}; known are {', '.join(_RULES)}")
    try:
        rule: Rule = _RULES[name](**values)
    except TypeError as error:
        raise ArgumentError(f"rule {name}: {error}") from None
    return rule
