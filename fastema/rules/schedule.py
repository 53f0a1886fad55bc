"""Schedules: at which steps averages are updated, and with what weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastema.errors import ArgumentError
from fastema.rules.checks import decay_error, validate_int, validate_weight
from fastema.rules.means import Window
from fastema.rules.rule import Rule, describe_rule, rule_from_dict

__all__ = ["Schedule"]


@dataclass(frozen=True, slots=True, init=False)
class Schedule:
    """The weight of the new value for each of K averages, as a pure function of the step.

    Parameters
    ----------
    rules : Rule or iterable of Rule
        One rule for each average of the same weights.
    update_every : int
        Update at every k-th step only, at 1/k of the cost; 1 by default. The rule returns the
        weight that keeps its horizon in steps, such as ``1 - decay ** k``.
    start_after : int
        Up to and including this step, the averages equal the weights. Averaging begins after it;
        0 by default.

    Raises
    ------
    ArgumentError
        If there is no rule, a checkpoint cannot store a rule, the rules have different phases, or a
        number is out of range.
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
                    raise decay_error(rule)
                raise ArgumentError(
                    f"decay={rule!r}: expected a number in [0, 1) or a rule of fastema.rules"
                )
            describe_rule(rule)
        if not given:
            raise ArgumentError("decay=(): expected at least one number or rule")
        if len({rule.phase for rule in given if isinstance(rule, Rule)}) > 1:
            raise ArgumentError(
                f"decay={given!r}: averages that are updated together need rules of the same phase"
            )
        object.__setattr__(self, "rules", given)
        object.__setattr__(self, "update_every", validate_int(update_every, "update_every", 1))
        object.__setattr__(self, "start_after", validate_int(start_after, "start_after", 0))

    @property
    def window(self) -> int:
        """Updates in a windowed mean, the slots of its ring; 0 for other averages."""
        first = self.rules[0]
        return first.size if isinstance(first, Window) else 0

    @property
    def phase(self) -> int:
        """Remainder modulo ``update_every`` of the steps that update the averages."""
        phase = self.rules[0].phase
        return (self.start_after if phase is None else phase) % self.update_every

    @property
    def offset(self) -> int:
        """Steps from the last step with remainder :attr:`phase` to ``start_after``."""
        return (self.start_after - self.phase) % self.update_every

    def log_decays(self, step: int) -> tuple[float, ...]:
        """Return ``log_decays`` for :meth:`weigh` at ``step``, if every step so far was a call."""
        m, every = max(step - self.start_after, 0), self.update_every
        taken = m + self.offset if m else 0
        return tuple([rule.log_decay(taken - taken % every, every) for rule in self.rules])

    def weights(self, step: int, steps: int = 1) -> tuple[float, ...]:
        """Return the weights in [0, 1] of the new value at ``step >= 1``; () if no update is due.

        Let ``m = step - start_after`` and ``k = update_every``:

        - ``m < 0``: no update.
        - ``m = 0``, if ``start_after`` is above 0: 1, a copy.
        - ``m`` a multiple of ``k``: ``rule.weight(m, k)``. For rules with a phase, ``step - phase``
          must be the multiple.
        - otherwise: no update.

        If ``steps`` have passed since the previous call, all multiples among them count together.
        Every earlier step is assumed to have been a call of its own; use :meth:`weigh` otherwise.

        Raises
        ------
        ArgumentError
            If a rule returns a weight outside [0, 1].

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
        """Return :meth:`weights` at a step of any run, and ``log_decays`` for the next call.

        Pass the ``log_decays`` that the previous call returned, and ``log_decays(0)`` to the first
        call. They are the logarithm of the remaining initial share of each average, see
        :meth:`Rule.log_decay`.
        """
        m, every = step - self.start_after, self.update_every
        if m < 0 or not step:
            return (), log_decays
        offset = self.offset if every > 1 else 0
        last = m - (m + offset) % every
        if m < steps and self.start_after:  # averaging began since the previous call
            begun = self.log_decays(self.start_after)
            if last > 0:  # these weights are also the first that are averaged
                begun = self._weigh_rules(step, last, last, begun)[1]
            return (1.0,) * len(self.rules), begun
        counted = m + offset
        due = counted // every - (counted - steps) // every
        if not due:
            return (), log_decays
        return self._weigh_rules(step, last, due * every, log_decays)

    def _weigh_rules(
        self, step: int, last: int, length: int, log_decays: tuple[float, ...]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        weights, after = [], []
        for rule, log_decay in zip(self.rules, log_decays, strict=True):
            weight, left = rule.weigh(last, length, log_decay)
            weights.append(validate_weight(weight, rule, step))
            after.append(left)
        return tuple(weights), tuple(after)

    def decays(self, step: int) -> tuple[float, ...]:
        """Return the decay per step of each rule at a step; 0 until averaging begins."""
        m = step - self.start_after
        if m <= 0 and self.start_after:
            return (0.0,) * len(self.rules)
        return tuple([rule.decay(max(m, 1)) for rule in self.rules])

    def follows(self, step: int) -> bool:
        """Return whether ``step`` is before ``start_after``: the averages equal the weights."""
        return step < self.start_after

    def discards(self, step: int, log_decays: tuple[float, ...] | None = None) -> bool:
        """Return whether the update after ``step`` replaces an average by the weights.

        That holds before ``start_after``, and for rules that begin with the first weights, such as
        means. ``log_decays`` are those at ``step``, by default of a run of one call for each step.
        """
        before = self.log_decays(step) if log_decays is None else log_decays
        weights, _ = self.weigh(step + self.update_every, self.update_every, before)
        return self.follows(step) or max(weights, default=0.0) == 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as plain values for a checkpoint."""
        return {
            "rules": [describe_rule(rule) for rule in self.rules],
            "update_every": self.update_every,
            "start_after": self.start_after,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Schedule:
        """Return the schedule that :meth:`to_dict` described; raise ArgumentError if invalid."""
        try:
            rules, every, start = plain["rules"], plain["update_every"], plain["start_after"]
        except (KeyError, TypeError, IndexError) as error:
            raise ArgumentError(f"not a saved schedule: {error}") from None
        if not isinstance(rules, list | tuple):
            raise ArgumentError(f"not a saved schedule: rules={rules!r}, expected a list")
        return cls([rule_from_dict(rule) for rule in rules], every, start)
