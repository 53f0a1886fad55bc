"""When averages are updated and with what weights: rules, every ``k`` steps, from a step on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastema.errors import ArgumentError
from fastema.rules.checks import checked_weight, checked_whole
from fastema.rules.rule import Rule, rule_from_dict

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
        For no rule, or a number out of range.
    """

    rules: tuple[Rule, ...]
    update_every: int
    start_after: int

    def __init__(
        self, rules: Rule | Iterable[Rule], update_every: int = 1, start_after: int = 0
    ) -> None:
        several = isinstance(rules, Iterable) and not isinstance(rules, Rule | str | Mapping)
        given = tuple(rules) if several else (rules,)  # type: ignore[arg-type]
        for rule in given:
            if not isinstance(rule, Rule):
                raise ArgumentError(
                    f"decay={rule!r}: expected a number in [0, 1) or a rule of fastema.rules"
                )
        if not given:
            raise ArgumentError("decay=(): expected at least one number or rule")
        object.__setattr__(self, "rules", given)
        object.__setattr__(self, "update_every", checked_whole(update_every, "update_every", 1))
        object.__setattr__(self, "start_after", checked_whole(start_after, "start_after", 0))

    def weights(self, step: int, steps: int = 1) -> tuple[float, ...]:
        """Weights of the new value at a step; empty where nothing is to be done.

        With ``m = step - start_after``: none for ``m < 0``; 1 (a copy) for ``m = 0``, if there is
        a start to wait for; else ``rule.weight(m, k)`` where ``m`` is a multiple of
        ``k = update_every``, and none between. Of several steps that are taken at once, those
        multiples count together.

        Parameters
        ----------
        step : int
            From 1.
        steps : int
            Since the previous call.

        Returns
        -------
        tuple of float
            K numbers in [0, 1], or none.

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
        m, every = step - self.start_after, self.update_every
        if m < 0 or not step:
            return ()
        if m < steps and self.start_after:  # they begin here, or did since the previous call
            return (1.0,) * len(self.rules)
        due = m // every - (m - steps) // every
        if not due:
            return ()
        last, length = m - m % every, due * every
        return tuple([checked_weight(rule.weight(last, length), rule, step) for rule in self.rules])

    def decays(self, step: int) -> tuple[float, ...]:
        """Decay per step of each rule that is in force at a step; 0 until the averages begin."""
        m = step - self.start_after
        if m <= 0 and self.start_after:
            return (0.0,) * len(self.rules)
        return tuple([rule.decay(max(m, 1)) for rule in self.rules])

    def follows(self, step: int) -> bool:
        """Whether the averages are still the weights themselves at this step."""
        return step < self.start_after

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "rules": [rule.to_dict() for rule in self.rules],
            "update_every": self.update_every,
            "start_after": self.start_after,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Schedule:
        """The schedule that :meth:`to_dict` described.

        Raises
        ------
        ArgumentError
            If an entry is missing, unknown or wrong.
        """
        try:
            rules, every, start = plain["rules"], plain["update_every"], plain["start_after"]
        except (KeyError, TypeError, IndexError) as error:
            raise ArgumentError(f"no description of a schedule: {error}") from None
        if not isinstance(rules, list | tuple):
            raise ArgumentError(f"no description of a schedule: rules={rules!r}, expected a list")
        return cls([rule_from_dict(rule) for rule in rules], every, start)
