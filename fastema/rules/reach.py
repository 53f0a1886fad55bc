"""How far back an average of weights looks at a step of a run."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastema.errors import ArgumentError
from fastema.rules.checks import checked_weight, checked_whole
from fastema.rules.debias import Debiased
from fastema.rules.ema import Constant
from fastema.rules.power import Power
from fastema.rules.rule import Rule
from fastema.rules.sma import Window
from fastema.rules.swa import CumulativeMean

__all__ = ["Reach", "effective_steps"]

# So many of the newest updates are gone through one by one; before them a rule is looked at once
# in so many parts of the way that is left to either end.
_EXACT = 1 << 17
_PARTS = 512
# What is older is not counted once so little is left to it.
_NEGLIGIBLE = 1e-18


class Reach(NamedTuple):
    """What an average is made of at a step.

    Attributes
    ----------
    mean_age : float
        Mean age of the averaged weights in steps, each counted with its share: the average lags
        behind the weights by so much. The initial weights are as old as the average.
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
    """As many updates with the same weight, put together by doubling."""
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


def _uniform(updates: int, every: int) -> tuple[float, float]:
    """Mean and standard deviation of the ages ``0, every, ..., (updates - 1) * every``."""
    return every * (updates - 1) / 2, every * math.sqrt((updates * updates - 1) / 12)


def _power_sum(exponent: float, updates: int) -> float:
    """``sum of (j / updates) ** exponent`` over ``j`` from 1 to ``updates - 1``.

    By Euler and Maclaurin, with the first terms as they are: to a relative 1e-12 for exponents of
    at least 1 and up to ``updates / 64``.
    """
    first = 64

    def corrections(at: int) -> float:
        x = exponent / at
        third = x * (exponent - 1) * (exponent - 2) / at**2
        fifth = third * (exponent - 3) * (exponent - 4) / at**2
        return float((at / updates) ** exponent * (x / 12 - third / 720 + fifth / 30240))

    def below(at: int) -> float:
        share = float((at / updates) ** exponent)
        return share * (at / (exponent + 1) - 0.5) + corrections(at)

    head = math.fsum((j / updates) ** exponent for j in range(1, first))
    return head + below(updates) - below(first)


def _power_ages(gamma: float, updates: int, every: int) -> tuple[float, float]:
    """Mean and standard deviation of the ages in a power average after many updates."""
    # The share of what is at least k updates old is (1 - k / updates) ** (gamma + 1).
    older = _power_sum(gamma + 1, updates)
    mean = older
    square = (2 * updates - 1) * older - 2 * updates * _power_sum(gamma + 2, updates)
    return every * mean, every * math.sqrt(max(square - mean * mean, 0.0))


def effective_steps(rule: Rule, n: int, every: int = 1) -> Reach:
    """How far back the average of a rule looks at a step: mean age and initial share.

    With ``w`` the weight of the new value, the mean age after an update is
    ``(1 - w) * (mean age before + every)``, and the share of the initial weights falls by
    ``1 - w``. For example ``1 / (1 - decay) - 1`` steps for a constant decay in the long run,
    ``(n - 1) / 2`` for the cumulative mean, ``n / (gamma + 2)`` for power-function averages.

    Parameters
    ----------
    rule : Rule
        For a :class:`~fastema.rules.Window`, the windowed mean that is kept with a ring.
    n : int
        Steps since the average began as a copy of the weights, at least 0.
    every : int
        Steps from one update to the next; between two the average ages.

    Returns
    -------
    Reach
        Mean and standard deviation of the age in steps, and the initial share; for a debiased rule
        of its values alone.

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
        mean, std = _uniform(values, every)
        return Reach(mean + since, std, 0.0)
    # A few thousand updates are soon gone through, and so is a profile much shorter than the run.
    if isinstance(rule, Power) and updates > 4096 and (rule.gamma + 2) * 64 < updates:
        mean, std = _power_ages(rule.gamma, updates, every)
        return Reach(mean + since, std, 0.0)
    corrected = isinstance(rule, Debiased)
    if isinstance(rule, Debiased):
        rule = rule.inner
    if isinstance(rule, Constant):
        span = _steady(rule.weight(every, every), updates, every)
    else:
        span = _walked(rule, updates, every)
    share = 0.0
    if not corrected:
        share, span = span.rest, span.then(_INITIAL)
    std = math.sqrt(span.spread / span.mass) if span.mass else 0.0
    return Reach(span.mean + since, std, share)
