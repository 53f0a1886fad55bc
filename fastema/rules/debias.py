"""Bias correction, which removes the initial value from an average."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastema.errors import ArgumentError
from fastema.rules.checks import MAX_STEPS, validate_weight
from fastema.rules.ema import Constant
from fastema.rules.rule import LOG_NEGLIGIBLE, Rule

__all__ = ["Debiased", "debiased"]

# Updates between two cached sums. A cached sum takes 8 bytes; when a run goes back, at most this
# many updates are recomputed.
_BLOCK = 256


def _add_log_decay(log_decay: float, weight: float) -> float:
    return max(log_decay + math.log1p(-weight), LOG_NEGLIGIBLE) if weight < 1.0 else LOG_NEGLIGIBLE


class _LogDecayCache:
    """The sum of the logarithms of a rule's decays in a run whose updates all have one length.

    The sum is a pure function of the update; the cache only saves time. Threads need no lock, since
    all of them write the same values.
    """

    __slots__ = ("_every", "_full", "_last", "_marks", "_rule")

    def __init__(self, rule: Rule, every: int) -> None:
        self._rule, self._every = rule, every
        self._last = 0, 0.0
        self._marks = {0: 0.0}  # after every _BLOCK-th update, without gaps
        self._full = MAX_STEPS  # from this update on, no initial value remains

    def log_decay_after(self, count: int) -> float:
        """Return the sum after ``count`` updates; only the first call takes time linear in it."""
        if count >= self._full:
            return LOG_NEGLIGIBLE
        block = min(count // _BLOCK, len(self._marks) - 1)
        done, log_decay = block * _BLOCK, self._marks[block]
        last = self._last
        if done < last[0] <= count:
            done, log_decay = last
        while done < count:
            done += 1
            step = done * self._every
            weight = validate_weight(self._rule.weight(step, self._every), self._rule, step)
            log_decay = _add_log_decay(log_decay, weight)
            if log_decay == LOG_NEGLIGIBLE:
                self._full = done
                return LOG_NEGLIGIBLE
            if not done % _BLOCK:
                self._marks[done // _BLOCK] = log_decay
        self._last = done, log_decay
        return log_decay


@dataclass(frozen=True, slots=True)
class Debiased(Rule):
    """Bias-corrected version of a rule; see :func:`debiased`."""

    inner: Rule
    _runs: dict[int, _LogDecayCache] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Rule):
            raise ArgumentError(f"debiased({self.inner!r}): expected a rule of fastema.rules")
        if isinstance(self.inner, Debiased):  # a second correction has no effect
            object.__setattr__(self, "inner", self.inner.inner)

    @property
    def phase(self) -> int | None:  # type: ignore[override]
        """Phase of the inner rule."""
        return self.inner.phase

    def decay(self, n: int) -> float:
        """Return ``1 - weight(n)``."""
        return 1.0 - self.weight(n)

    def weight(self, n: int, every: int = 1) -> float:
        """Return ``w_n / (1 - prod decays)``, for a run whose updates all span ``every`` steps."""
        return self.weigh(n, every, self.log_decay(n - every, every))[0]

    def log_decay(self, n: int, every: int = 1) -> float:
        """Return ``sum of log(decay)`` over the updates up to ``n``, at least -64."""
        count = max(n // every, 0)
        if isinstance(self.inner, Constant):
            decay = self.inner.value
            if not count or not decay:
                return LOG_NEGLIGIBLE if count else 0.0
            return max(count * every * math.log(decay), LOG_NEGLIGIBLE)
        run = self._runs.get(every)
        if run is None:
            run = self._runs.setdefault(every, _LogDecayCache(self.inner, every))
        return run.log_decay_after(count)

    def weigh(self, n: int, every: int, log_decay: float) -> tuple[float, float]:
        """Return ``w / (1 - exp(after))`` and ``log_decay_after``, ``log_decay`` after this update.

        ``w`` is the weight of the inner rule.
        """
        weight = validate_weight(self.inner.weight(n, every), self.inner, n)
        after = _add_log_decay(log_decay, weight)
        # Until the rule has averaged something, the average equals the weights.
        return (min(weight / -math.expm1(after), 1.0) if log_decay else 1.0), after


def debiased(rule: Rule) -> Debiased:
    """Return ``rule`` with bias correction: the initial value does not count in the average.

    Start an average at zero, ``z_n = z_(n-1) + w_n * (x_n - z_(n-1))``, and divide it by the total
    weight so far, ``c_n = 1 - prod_k (1 - w_k)``. This is the zero debiasing of TensorFlow and the
    bias correction of Adam. ``z_n / c_n`` is computed as an average itself,
    ``avg_n = avg_(n-1) + (w_n / c_n) * (x_n - avg_(n-1))``; the first update copies the weights.

    Parameters
    ----------
    rule : Rule
        The rule to correct, such as ``constant(0.999)``, for which ``c_n = 1 - 0.999**n``. For
        rules that are not constant, the first call at step n takes time proportional to n, below
        a second for a million steps.

    Raises
    ------
    ArgumentError
        If ``rule`` is not a rule.

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
