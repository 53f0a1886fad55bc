"""Bias correction: the average of what was seen, without the value that it began with."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

from fastema.errors import ArgumentError
from fastema.rules.checks import checked_weight
from fastema.rules.ema import Constant
from fastema.rules.rule import Rule

__all__ = ["Debiased", "debiased"]

# Updates between two states that are kept: 16 bytes for so many updates, and as many steps of the
# recursion when a run goes back.
_BLOCK = 256
# Below half a unit in the last place of 1: what is left of the beginning no longer counts.
_NEGLIGIBLE = 2.0**-60


class _State(NamedTuple):
    updates: int
    taken: float  # share of the weights seen, 1 - the product of the decays
    left: float  # share of the beginning, the product


class _Taken:
    """Share that the weights seen so far have in an average of a rule, by number of updates.

    A pure function: whatever was asked before, a number comes out of the same operations. What is
    kept only saves time, and every write to it is one reference that replaces another, so threads
    need no lock.
    """

    __slots__ = ("_every", "_full", "_last", "_marks", "_rule", "_top")

    def __init__(self, rule: Rule, every: int) -> None:
        self._rule, self._every = rule, every
        self._last = _State(0, 0.0, 1.0)
        self._marks = {0: self._last}  # of every _BLOCK-th update, without gaps up to _top
        self._top = 0
        self._full = sys.maxsize  # from this update on it is 1

    def after(self, count: int) -> float:
        """The share after so many updates; linear in them at the first call, then constant."""
        if count >= self._full:
            return 1.0
        state = self._marks[min(count // _BLOCK, self._top)]
        last = self._last
        if state.updates < last.updates <= count:
            state = last
        while state.updates < count:
            state = self._next(state)
            if state.left <= _NEGLIGIBLE:
                self._full = state.updates
                return 1.0
        self._last = state
        return state.taken

    def _next(self, state: _State) -> _State:
        count = state.updates + 1
        step = count * self._every
        weight = checked_weight(self._rule.weight(step, self._every), self._rule, step)
        # Of the two, the smaller is carried on, which keeps its digits, and gives the other.
        if state.taken < 0.5:
            taken = state.taken + weight * state.left
            left = 1.0 - taken
        else:
            left = state.left * (1.0 - weight)
            taken = 1.0 - left
        after = _State(count, taken, left)
        block, rest = divmod(count, _BLOCK)
        if not rest:
            self._marks[block] = after
            self._top = block
        return after


@dataclass(frozen=True, slots=True)
class Debiased(Rule):
    """See :func:`debiased`."""

    inner: Rule
    _taken: dict[int, _Taken] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Rule):
            raise ArgumentError(f"debiased({self.inner!r}): expected a rule of fastema.rules")

    def decay(self, n: int) -> float:
        """``1 - weight(n)``."""
        return 1.0 - self.weight(n)

    def weight(self, n: int, every: int = 1) -> float:
        """The rule's weight over the share of everything seen, ``w_n / (1 - prod decays)``."""
        count = max(n // every, 1)
        if isinstance(self.inner, Constant):
            decay = self.inner.value
            if decay == 0.0:
                return 1.0
            rate = every * math.log(decay)
            return math.expm1(rate) / math.expm1(count * rate)
        seen = self._taken.get(every)
        if seen is None:
            seen = self._taken.setdefault(every, _Taken(self.inner, every))
        taken = seen.after(count)
        # As long as the rule has taken nothing in, the average is the weights themselves.
        return min(self.inner.weight(n, every) / taken, 1.0) if taken else 1.0


def debiased(rule: Rule) -> Debiased:
    """A rule without the value that its average began with.

    The average that starts from zero, ``z_n = z_(n-1) + w_n * (x_n - z_(n-1))``, divided by the
    share of the weights seen, ``c_n = 1 - prod_k (1 - w_k)``: the zero debiasing of TensorFlow and
    the bias correction of Adam. ``z_n / c_n`` is itself an average,
    ``avg_n = avg_(n-1) + (w_n / c_n) * (x_n - avg_(n-1))``, and that is how it is computed. The
    first update copies the weights; the later ones approach the rule.

    Parameters
    ----------
    rule : Rule
        Such as ``constant(0.999)``, for which ``c_n = 1 - 0.999**n``. For other rules the first
        call at step n of a run takes a time proportional to n, below a second for a million.

    Raises
    ------
    ArgumentError
        If it is no rule.

    Examples
    --------
    >>> from fastema.rules import constant
    >>> rule = debiased(constant(0.9))
    >>> [round(rule.weight(n), 4) for n in (1, 2, 10, 100)]
    [1.0, 0.5263, 0.1535, 0.1]

    References
    ----------
    D. Kingma and J. Ba, Adam: A Method for Stochastic Optimization, 2014, section 3,
    https://arxiv.org/abs/1412.6980
    """
    return Debiased(rule)
