"""When an average is updated and with what weight: a rule, every ``k`` steps, from a step on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastema.errors import ArgumentError
from fastema.rules.ema import Rule, rule_from_dict

__all__ = ["Schedule"]


def _whole(value: Any, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name}={value!r}: expected a whole number of at least {least}")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Weights of a run, as a pure function of the step.

    Parameters
    ----------
    rule : Rule
        The decay per step.
    update_every : int
        Touch memory at every k-th step only, with ``decay ** k``: the horizon in steps stays what
        it is, at 1/k of the cost.
    start_after : int
        Up to and including this step the average is the weights themselves; it begins there.
    """

    rule: Rule
    update_every: int = 1
    start_after: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise ArgumentError(
                f"decay={self.rule!r}: expected a number in [0, 1) or a rule of fastema.rules"
            )
        _whole(self.update_every, "update_every", 1)
        _whole(self.start_after, "start_after", 0)

    def weight(self, step: int) -> float:
        """Weight of the new value at a step, counted from 1; 0 where nothing is to be done.

        With ``m = step - start_after``: 0 for ``m < 0``; 1 (a copy) for ``m = 0``; else
        ``1 - rule.decay(m) ** k`` where ``m`` is a multiple of ``k = update_every``, and 0 between.

        Examples
        --------
        >>> from fastema.rules import constant
        >>> [round(Schedule(constant(0.9), 2, 1).weight(n), 2) for n in (1, 2, 3, 4, 5)]
        [1.0, 0.0, 0.19, 0.0, 0.19]
        """
        m = step - self.start_after
        if m < 0 or m % self.update_every:
            return 0.0
        return 1.0 if m == 0 else 1.0 - self.rule.decay(m) ** self.update_every

    def decay(self, step: int) -> float:
        """Decay per step that is in force at a step (0 until the average begins)."""
        m = step - self.start_after
        return self.rule.decay(max(m, 1)) if m > 0 or not self.start_after else 0.0

    def follows(self, step: int) -> bool:
        """Whether the average is still the weights themselves at this step."""
        return step < self.start_after

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "rule": self.rule.to_dict(),
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
            rule, every, start = plain["rule"], plain["update_every"], plain["start_after"]
        except (KeyError, TypeError, IndexError) as error:
            raise ArgumentError(f"no description of a schedule: {error}") from None
        return cls(rule_from_dict(rule), every, start)
