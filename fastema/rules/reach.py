"""The age of the weights that an average contains at a step of a run."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastema.errors import ArgumentError
from fastema.rules.checks import validate_int, validate_weight
from fastema.rules.debias import Debiased
from fastema.rules.ema import Constant
from fastema.rules.means import CumulativeMean, Window
from fastema.rules.power import Power
from fastema.rules.rule import Rule

__all__ = ["Reach", "effective_steps"]

# The newest _EXACT updates are evaluated one by one. For older ones a rule is evaluated once per
# part; a part is 1 / _PARTS of the distance to the nearer end of this range of updates.
_EXACT = 1 << 17
_PARTS = 512
# Older updates are ignored once their total share is below this.
_NEGLIGIBLE = 1e-18
# The number of powers that are summed one by one, before a series takes over.
_FIRST = 16


class Reach(NamedTuple):
    """The age and the initial share of the weights in an average at a step.

    Attributes
    ----------
    mean_age : float
        Mean age of the averaged weights, in steps: the average lags behind the weights by this
        many. The initial weights are as old as the average.
    std_age : float
        Standard deviation of the age, in steps.
    initial_share : float
        Share of the initial weights in the average, in [0, 1].
    """

    mean_age: float
    std_age: float
    initial_share: float


class _Span(NamedTuple):
    """The values of consecutive updates, and the share that remains for older values."""

    rest: float  # share of all older values
    length: float  # steps
    mass: float  # share of the values in the span
    mean: float  # their mean age, counted from the end of the span
    spread: float  # sum of share times squared distance from the mean

    def merge(self, older: _Span) -> _Span:
        """Return this span merged with the ``older`` span before it."""
        mass = self.rest * older.mass
        whole = self.mass + mass
        part = mass / whole if whole else 0.0
        gap = older.mean + self.length - self.mean
        # All terms are positive: nothing cancels, however many spans are merged.
        return _Span(
            self.rest * older.rest,
            self.length + older.length,
            whole,
            self.mean + gap * part,
            self.spread + self.rest * older.spread + gap * gap * part * self.mass,
        )


_NOTHING = _Span(1.0, 0.0, 0.0, 0.0, 0.0)
_INITIAL = _Span(0.0, 0.0, 1.0, 0.0, 0.0)


def _merge_equal_updates(weight: float, updates: int, every: int) -> _Span:
    """Return the span of ``updates`` updates with equal weights, merged by doubling."""
    if weight == 1.0:
        return _Span(0.0, float(updates * every), 1.0, 0.0, 0.0)
    rate = math.log1p(-weight)
    span, power, length = _NOTHING, _Span(1.0 - weight, float(every), weight, 0.0, 0.0), 1
    while True:
        if updates & length:
            span = span.merge(power)
        if length * 2 > updates:
            return span
        # A product of rounded factors would drift; the exponential does not.
        power, length = power.merge(power), length * 2
        power = power._replace(rest=math.exp(length * rate))


def _merge_updates(rule: Rule, updates: int, every: int) -> _Span:
    """Return the span of a rule's updates, from the newest back to the first that still counts."""
    span, left = _NOTHING, updates
    while left and span.rest > _NEGLIGIBLE:
        part = max(min(updates - left - _EXACT, left) // _PARTS, 1)
        step = (left - part // 2) * every
        weight = validate_weight(rule.weight(step, every), rule, step)
        if part == 1:
            span = span.merge(_Span(1.0 - weight, float(every), weight, 0.0, 0.0))
        else:
            span = span.merge(_merge_equal_updates(weight, part, every))
        left -= part
    return span._replace(rest=0.0) if left else span


def _power_ages(gamma: float, updates: int) -> tuple[float, float]:
    """Return the mean and standard deviation of the ages in a power average, in updates, to 1e-12.

    Values at least k updates old have the share ``(1 - k / updates) ** (gamma + 1)``.
    """

    def total(exponent: float) -> float:
        """Return the Euler-Maclaurin sum of ``(j / updates) ** exponent`` for j < ``updates``."""

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
    """Return the mean age, its standard deviation and the initial share of an average at a step.

    Let ``w`` be the weight of the new value. The mean age after an update is
    ``(1 - w) * (mean age before + every)``. In the long run it is ``1 / (1 - decay) - 1`` steps for
    a constant decay, ``(n - 1) / 2`` for the cumulative mean and ``n / (gamma + 2)`` for the power
    function.

    Parameters
    ----------
    rule : Rule
        The rule of the average. A debiased rule has no initial share; a
        :class:`~fastema.rules.Window` stands for the windowed mean, computed with a ring.
    n : int
        Steps since the average began as a copy of the weights, at least 0.
    every : int
        Steps from one update to the next, at least 1; 1 by default. The average ages between
        updates.

    Raises
    ------
    ArgumentError
        If ``rule`` is not a rule, or a number is out of range.

    Notes
    -----
    The averages above use a closed form or doubling. Other rules are evaluated at each of the
    newest 131,072 updates. If older updates still count, the rule is evaluated there about 500
    times per factor of e, which assumes that it changes smoothly. A call takes less than a second
    for any n.

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
    n, every = validate_int(n, "n", 0), validate_int(every, "every", 1)
    updates, since = divmod(n, every)
    if not updates:
        return Reach(float(n), 0.0, 1.0)
    if isinstance(rule, CumulativeMean | Window):
        values = rule.filled(n, every) if isinstance(rule, Window) else updates
        mean, std = every * (values - 1) / 2, every * math.sqrt((values * values - 1) / 12)
        return Reach(mean + since, std, 0.0)
    # For a narrower profile the loop below is quick: it ends after 2,700 updates.
    if isinstance(rule, Power) and (rule.gamma + 2) * 64 < updates:
        mean, std = _power_ages(rule.gamma, updates)
        return Reach(every * mean + since, every * std, 0.0)
    inner = rule.inner if isinstance(rule, Debiased) else rule
    if isinstance(inner, Constant):
        span = _merge_equal_updates(inner.weight(every, every), updates, every)
    else:
        span = _merge_updates(inner, updates, every)
    share = 0.0
    if inner is rule:
        share, span = span.rest, span.merge(_INITIAL)
    std = math.sqrt(span.spread / span.mass) if span.mass else 0.0
    return Reach(span.mean + since, std, share)
