"""What every average is made of: a rule, which maps a step to the weight of the new value.

The average does ``avg += w * (x - avg)``. A rule gives the ``decay`` per step, the weight of the
*old* average (what mmengine and optax call momentum or step size is ``1 - decay``), and from it the
weight ``w`` of the new value where only every k-th step updates the average.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

from fastema.errors import ArgumentError

__all__ = ["GONE", "Rule", "described", "plain_value", "rule_from_dict"]

GONE = -64.0
"""Logarithm of a share that no longer counts: 1 - exp(-64) is 1 in float64, many times over."""

_RULES: dict[str, type[Rule]] = {}


class Rule(ABC):
    """Base of every rule; subclass it for a schedule of your own.

    A rule is a pure function of the step. Make it a frozen dataclass whose fields are plain values,
    tuples of them or other rules: then checkpoints hold it, by :meth:`to_dict` and
    :func:`rule_from_dict`. :meth:`decay` is all that has to be written.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Linear(Rule):
    ...     last: float
    ...     steps: int
    ...     def decay(self, n):
    ...         return self.last * min(n / self.steps, 1.0)
    >>> rule = Linear(0.999, 1000)
    >>> rule.decay(500)
    0.4995
    >>> rule_from_dict(rule.to_dict()) == rule
    True
    """

    __slots__ = ()

    phase: ClassVar[int | None] = None
    """With ``update_every=k``, steps ``phase``, ``phase + k``, ``phase + 2 * k``, ... update the
    average. None: every k-th step counted from ``start_after``."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _RULES[_name_of(cls)] = cls

    @abstractmethod
    def decay(self, n: int) -> float:
        """Weight of the old average, in [0, 1], in step ``n >= 1`` since the average began."""

    def weight(self, n: int, every: int = 1) -> float:
        """Weight of the new value, in [0, 1], in a step: ``1 - decay(n) ** every``.

        A rule overrides it where the product of the decays of the ``every`` steps since the
        previous update is known better. ``n`` is a multiple of ``every``.
        """
        decay = self.decay(n)
        if every == 1:
            return 1.0 - decay
        # Near 1 the power is too close to 1 for the difference to keep its digits.
        return -math.expm1(every * math.log(decay)) if decay > 0.0 else 1.0 - decay**every

    def log_decay(self, n: int, every: int = 1) -> float:
        """Logarithm of the share of the initial weights still to be corrected at step ``n >= 0``.

        Each update so far was of ``every`` steps. From -64, which stands for nothing, to 0; always
        -64 for a rule without bias correction.
        """
        return GONE

    def weigh(self, n: int, every: int, log_decay: float) -> tuple[float, float]:
        """Weight of the new value in a run whose updates need not be of one length.

        Takes :meth:`log_decay` after the updates so far, and returns it after this one as well.
        """
        return self.weight(n, every), log_decay

    def to_dict(self) -> dict[str, Any]:
        """Plain values that :func:`rule_from_dict` rebuilds the rule from.

        ``{"rule": name}`` and the dataclass fields that the constructor takes; rules among them are
        described in turn, tuples become lists. The name is the class's own for rules of fastema
        and ``module.qualified_name`` for others. An ArgumentError for what this cannot describe.
        """
        if not is_dataclass(self):
            raise ArgumentError(
                f"{type(self).__name__} cannot be described: make it a frozen dataclass, or "
                "override to_dict() to return {'rule': ..., and the constructor's arguments}"
            )
        own = type(self).__name__
        plain = {
            f.name: plain_value(getattr(self, f.name), f"{own}.{f.name}")
            for f in fields(self)
            if f.init
        }
        if "rule" in plain:
            raise ArgumentError(
                f"{own}: rename the field 'rule'; a description holds the name of "
                "the class under it"
            )
        return {"rule": _name_of(type(self)), **plain}


def _name_of(kind: type[Rule]) -> str:
    ours = kind.__module__.startswith("fastema.rules.")
    return kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}"


def described(rule: Rule) -> dict[str, Any]:
    """Call :meth:`Rule.to_dict`; an error names the rule if no checkpoint can hold it."""
    plain: dict[str, Any] = plain_value(rule.to_dict(), f"{type(rule).__name__}.to_dict()")
    return plain


def plain_value(value: Any, place: str) -> Any:
    """A value as a checkpoint holds it: NumPy's numbers become Python's, and tuples lists."""
    if isinstance(value, Rule):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain_value(one, f"{place}[{key!r}]") for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [plain_value(one, f"{place}[{i}]") for i, one in enumerate(value)]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    kind = type(value)
    raise ArgumentError(
        f"{place} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: a "
        "rule is described by strings, numbers, tuples and dicts of them, and other rules"
    )


def _rebuilt(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "rule" in value:
            return rule_from_dict(value)
        return {key: _rebuilt(one) for key, one in value.items()}
    return tuple(_rebuilt(one) for one in value) if isinstance(value, tuple | list) else value


def rule_from_dict(plain: Mapping[str, Any]) -> Rule:
    """The rule that :meth:`Rule.to_dict` described; lists become tuples.

    A class of your own has to be defined, under the name it had, before it is loaded. An
    ArgumentError for an unknown rule, or wrong parameters.
    """
    values = dict(plain) if isinstance(plain, Mapping) else {}
    name = values.pop("rule", None)
    if not isinstance(name, str) or name not in _RULES:
        raise ArgumentError(
            f"unknown rule {name!r}; known are {', '.join(sorted(_RULES))}. A rule of your own has "
            "to be defined, or imported, before it is loaded"
        )
    try:
        return _RULES[name](**{key: _rebuilt(value) for key, value in values.items()})
    except TypeError as error:
        raise ArgumentError(f"rule {name}: {error}") from None
