"""Age of the weights in an average at a step of a run."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastema.errors import ArgumentError
from fastema.rules.checks import checked_weight, checked_whole
from fastema.rules.debias import Debiased
from fastema.rules.ema import Constant
from fastema.rules.means import CumulativeMean, Window
from fastema.rules.power import Power
from fastema.rules.rule import Rule

__all__ = ["Reach", "effective_steps"]

# So many of the newest updates are gone through one by one; before them a rule is looked at once
# in so many parts of the way that is left to either end.
_EXACT = 1 << 17
_PARTS = 512
# What is older is not counted once so little is left to it.
_NEGLIGIBLE = 1e-18
# Powers of so many integers are summed before a series says the rest.
_FIRST = 16


class Reach(NamedTuple):
    """Composition of an average at a step.

    Attributes
    ----------
    mean_age : float
        Mean age of the averaged weights in steps: the average lags behind the weights by so much.
        The initial weights are as old as the average.
    std_age : float
        Standard deviation of the age, in steps.
    initial_share : float
        Share of the weights that the average began with, in [0, 1].
    """

    mean_age: float
    std_age: float
    initial_share: float


class _Span(NamedTuple):
    """Values taken in during some steps on end, and what is left to everything before them."""

    rest: float  # share of everything before
    length: float  # steps
    mass: float  # share of the values
    mean: float  # of their ages, counted from the end of the span
    spread: float  # sum of share times squared distance from that mean

    def then(self, older: _Span) -> _Span:
        """The span and the one before it, as one."""
        mass = self.rest * older.mass
        whole = self.mass + mass
        part = mass / whole if whole else 0.0
        gap = older.mean + self.length - self.mean
        # Only positive terms: nothing cancels, however many spans are put together.
        return _Span(
            self.rest * older.rest,
            self.length + older.length,
            whole,
            self.mean + gap * part,
            self.spread + self.rest * older.spread + gap * gap * part * self.mass,
        )


_NOTHING = _Span(1.0, 0.0, 0.0, 0.0, 0.0)
_INITIAL = _Span(0.0, 0.0, 1.0, 0.0, 0.0)


def _steady(weight: float, updates: int, every: int) -> _Span:
    """Join equal updates by doubling."""
    if weight == 1.0:
        return _Span(0.0, float(updates * every), 1.0, 0.0, 0.0)
    rate = math.log1p(-weight)
    span, power, length = _NOTHING, _Span(1.0 - weight, float(every), weight, 0.0, 0.0), 1
    while True:
        if updates & length:
            span = span.then(power)
        if length * 2 > updates:
            return span
        # The product of rounded factors would drift; the exponential does not.
        power, length = power.then(power), length * 2
        power = power._replace(rest=math.exp(length * rate))


def _walked(rule: Rule, updates: int, every: int) -> _Span:
    """The updates of a rule from the newest back to the first, or until they no longer count."""
    span, left = _NOTHING, updates
    while left and span.rest > _NEGLIGIBLE:
        part = max(min(updates - left - _EXACT, left) // _PARTS, 1)
        step = (left - part // 2) * every
        weight = checked_weight(rule.weight(step, every), rule, step)
        if part == 1:
            span = span.then(_Span(1.0 - weight, float(every), weight, 0.0, 0.0))
        else:
            span = span.then(_steady(weight, part, every))
        left -= part
    return span._replace(rest=0.0) if left else span


def _power_ages(gamma: float, updates: int) -> tuple[float, float]:
    """Mean and standard deviation of the ages in a power average, in updates, to 1e-12.

    The share of what is at least k updates old is ``(1 - k / updates) ** (gamma + 1)``.
    """

    def total(exponent: float) -> float:
        """Sum of ``(j / updates) ** exponent`` for j below updates, by Euler and Maclaurin."""

        def until(j: int) -> float:
            third = exponent * (exponent - 1) * (exponent - 2) / j**3
            inner = j / (exponent + 1) - 0.5 + exponent / j / 12 - third / 720
            return float((j / updates) ** exponent) * inner

        first = sum((j / updates) ** exponent for j in range(_FIRST))
        return float(first) + until(updates) - until(_FIRST)

    mean = total(gamma + 1)
    square = (2 * updates - 1) * mean - 2 * updates * total(gamma + 2)
    return mean, math.sqrt(max(square - mean * mean, 0.0))


def effective_steps(rule: Rule, n: int, every: int = 1) -> Reach:
    """Compute mean age and initial share of a rule's average at a step.

    With ``w`` the weight of the new value, the mean age after an update is
    ``(1 - w) * (mean age before + every)``: in the long run ``1 / (1 - decay) - 1`` steps for a
    constant decay, ``(n - 1) / 2`` for the cumulative mean, ``n / (gamma + 2)`` for the power
    function.

    Parameters
    ----------
    rule : Rule
        For a debiased rule its values alone count; for a :class:`~fastema.rules.Window` it is the
        windowed mean that is kept with a ring.
    n : int
        Steps since the average began as a copy of the weights, at least 0.
    every : int
        Steps from one update to the next; between two the average ages.

    Raises
    ------
    ArgumentError
        If it is no rule, or a number is out of range.

    Notes
    -----
    In closed form, or by doubling, for the averages above. Any other rule is asked for the newest
    131,072 updates one by one, and for older ones, should they still count, about 500 times in each
    factor of e; that assumes that it changes smoothly there. A call takes below a second for any n.

    Examples
    --------
    >>> from fastema.rules import constant, cumulative_mean
    >>> reach = effective_steps(constant(0.999), 2_000)
    >>> round(reach.mean_age), round(reach.initial_share, 3)
    (864, 0.135)
    >>> effective_steps(cumulative_mean(), 101).mean_age
    50.0
    """
    if not isinstance(rule, Rule):
        raise ArgumentError(f"rule={rule!r}: expected a rule of fastema.rules")
    n, every = checked_whole(n, "n", 0), checked_whole(every, "every", 1)
    updates, since = divmod(n, every)
    if not updates:
        return Reach(float(n), 0.0, 1.0)
    if isinstance(rule, CumulativeMean | Window):
        values = rule.filled(n, every) if isinstance(rule, Window) else updates
        mean, std = every * (values - 1) / 2, every * math.sqrt((values * values - 1) / 12)
        return Reach(mean + since, std, 0.0)
    # A narrower profile is soon gone through: its values stop counting after 2,700 updates.
    if isinstance(rule, Power) and (rule.gamma + 2) * 64 < updates:
        mean, std = _power_ages(rule.gamma, updates)
        return Reach(every * mean + since, every * std, 0.0)
    inner = rule.inner if isinstance(rule, Debiased) else rule
    if isinstance(inner, Constant):
        span = _steady(inner.weight(every, every), updates, every)
    else:
        span = _walked(inner, updates, every)
    share = 0.0
    if inner is rule:
        share, span = span.rest, span.then(_INITIAL)
    std = math.sqrt(span.spread / span.mass) if span.mass else 0.0
    return Reach(span.mean + since, std, share)
