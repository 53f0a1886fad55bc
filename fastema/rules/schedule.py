"""When averages are updated and with what weights: rules, every ``k`` steps, from a step on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastema.errors import ArgumentError
from fastema.rules.checks import checked_weight, checked_whole, no_decay
from fastema.rules.rule import Rule, described, rule_from_dict

__all__ = ["Schedule"]


@dataclass(frozen=True, slots=True, init=False)
class Schedule:
    """Weights of a run, one for each of K averages, as a pure function of the step.

    Parameters
    ----------
    rules : Rule or iterable of Rule
        One for each average of the same weights.
    update_every : int
        Touch memory at every k-th step only; a rule gives the weight that keeps its horizon in
        steps, such as ``1 - decay ** k``, at 1/k of the cost.
    start_after : int
        Up to and including this step the averages are the weights themselves; they begin there.

    Raises
    ------
    ArgumentError
        For no rule, one that a checkpoint could not describe, or a number out of range.
    """

    rules: tuple[Rule, ...]
    update_every: int
    start_after: int

    def __init__(
        self, rules: Rule | Iterable[Rule], update_every: int = 1, start_after: int = 0
    ) -> None:
        several = isinstance(rules, Iterable) and not isinstance(rules, Rule | str | Mapping)
        given: Any = tuple(rules) if several else (rules,)  # type: ignore[arg-type]
        for rule in given:
            if not isinstance(rule, Rule):
                if callable(rule):
                    raise no_decay(rule)
                raise ArgumentError(
                    f"decay={rule!r}: expected a number in [0, 1) or a rule of fastema.rules"
                )
            described(rule)
        if not given:
            raise ArgumentError("decay=(): expected at least one number or rule")
        if len({rule.phase for rule in given if isinstance(rule, Rule)}) > 1:
            raise ArgumentError(
                f"decay={given!r}: averages that are updated together need rules of one phase"
            )
        object.__setattr__(self, "rules", given)
        object.__setattr__(self, "update_every", checked_whole(update_every, "update_every", 1))
        object.__setattr__(self, "start_after", checked_whole(start_after, "start_after", 0))

    @property
    def phase(self) -> int:
        """Remainder of the steps that update the averages, divided by ``update_every``."""
        phase = self.rules[0].phase
        return (self.start_after if phase is None else phase) % self.update_every

    @property
    def offset(self) -> int:
        """Steps from such a step to ``start_after``."""
        return (self.start_after - self.phase) % self.update_every

    def log_decays(self, step: int) -> tuple[float, ...]:
        """Return what :meth:`weigh` needs to know of a run in which every step was a call."""
        m, every = max(step - self.start_after, 0), self.update_every
        taken = m + self.offset if m else 0
        return tuple([rule.log_decay(taken - taken % every, every) for rule in self.rules])

    def weights(self, step: int, steps: int = 1) -> tuple[float, ...]:
        """Weights in [0, 1] of the new value at a step from 1; empty where nothing is to be done.

        With ``m = step - start_after``: none for ``m < 0``; 1 (a copy) for ``m = 0``, if there is
        a start to wait for; else ``rule.weight(m, k)`` where ``m`` is a multiple of
        ``k = update_every`` (for a rule with a phase, where ``step - phase`` is one), and none
        between. Of several ``steps`` since the previous call, those multiples count together. Each
        step before was a call of its own; use :meth:`weigh` where that is unknown.

        Raises
        ------
        ArgumentError
            If a rule gives anything else.

        Examples
        --------
        >>> from fastema.rules import constant
        >>> schedule = Schedule(constant(0.9), update_every=2, start_after=1)
        >>> [[round(w, 2) for w in schedule.weights(n)] for n in (1, 2, 3, 4, 5)]
        [[1.0], [], [0.19], [], [0.19]]
        """
        return self.weigh(step, steps, self.log_decays(step - steps))[0]

    def weigh(
        self, step: int, steps: int, log_decays: tuple[float, ...]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """:meth:`weights` at a step of any run, and ``log_decays`` for the next call.

        ``log_decays`` are what the previous call returned, ``log_decays(0)`` at the first: for each
        average the logarithm of the share of the beginning that is left, see
        :meth:`Rule.log_decay`.
        """
        m, every = step - self.start_after, self.update_every
        if m < 0 or not step:
            return (), log_decays
        last = m - (m + self.offset) % every
        if m < steps and self.start_after:  # they begin here, or did since the previous call
            begun = self.log_decays(self.start_after)
            if last > 0:  # these weights are the first that are averaged
                begun = self._weighed(step, last, last, begun)[1]
            return (1.0,) * len(self.rules), begun
        counted = m + self.offset
        due = counted // every - (counted - steps) // every
        if not due:
            return (), log_decays
        return self._weighed(step, last, due * every, log_decays)

    def _weighed(
        self, step: int, last: int, length: int, log_decays: tuple[float, ...]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        weights, after = [], []
        for rule, log_decay in zip(self.rules, log_decays, strict=True):
            weight, left = rule.weigh(last, length, log_decay)
            weights.append(checked_weight(weight, rule, step))
            after.append(left)
        return tuple(weights), tuple(after)

    def decays(self, step: int) -> tuple[float, ...]:
        """Decay per step of each rule that is in force at a step; 0 until the averages begin."""
        m = step - self.start_after
        if m <= 0 and self.start_after:
            return (0.0,) * len(self.rules)
        return tuple([rule.decay(max(m, 1)) for rule in self.rules])

    def follows(self, step: int) -> bool:
        """Return whether the averages are still the weights themselves at this step."""
        return step < self.start_after

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "rules": [described(rule) for rule in self.rules],
            "update_every": self.update_every,
            "start_after": self.start_after,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Schedule:
        """The schedule that :meth:`to_dict` described; an ArgumentError if an entry is wrong."""
        try:
            rules, every, start = plain["rules"], plain["update_every"], plain["start_after"]
        except (KeyError, TypeError, IndexError) as error:
            raise ArgumentError(f"no description of a schedule: {error}") from None
        if not isinstance(rules, list | tuple):
            raise ArgumentError(f"no description of a schedule: rules={rules!r}, expected a list")
        return cls([rule_from_dict(rule) for rule in rules], every, start)
