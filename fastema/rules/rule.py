"""The base class of rules, which map a step to the weight of the new value in an average.

An average does ``avg += w * (x - avg)``. A rule defines ``decay``, the weight of the *old* average
per step; the momentum of mmengine and the step size of optax are ``1 - decay``. From the decay
follows the weight ``w`` of the new value, also when only every k-th step updates the average.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

from fastema.errors import ArgumentError

__all__ = ["LOG_NEGLIGIBLE", "Rule", "describe_rule", "rule_from_dict", "to_plain_value"]

LOG_NEGLIGIBLE = -64.0
"""Logarithm of a negligible share: 1 - exp(-64) rounds to 1 in float64, by a wide margin."""

_RULES: dict[str, type[Rule]] = {}


class Rule(ABC):
    """Base class of rules; subclass it to write your own schedule.

    A rule is a pure function of the step. Implement :meth:`decay`; every other method has a
    default. Make the class a frozen dataclass whose fields are plain values, tuples of plain values
    or other rules: :meth:`to_dict` and :func:`rule_from_dict` then save it in checkpoints and load
    it.

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
    average. If None, every k-th step counted from ``start_after`` does."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _RULES[_name_of(cls)] = cls

    @abstractmethod
    def decay(self, n: int) -> float:
        """Return the weight of the old average, in [0, 1], at step ``n >= 1`` of the average."""

    def weight(self, n: int, every: int = 1) -> float:
        """Return the weight of the new value, in [0, 1], at step ``n``: ``1 - decay(n) ** every``.

        ``n`` is a multiple of ``every``, the number of steps since the previous update. Override
        this method if the exact product of the decays of these steps has a formula.
        """
        decay = self.decay(n)
        if every == 1:
            return 1.0 - decay
        # For a decay near 1, subtracting the power from 1 would lose digits.
        return -math.expm1(every * math.log(decay)) if decay > 0.0 else 1.0 - decay**every

    def log_decay(self, n: int, every: int = 1) -> float:
        """Return the log of the initial share that bias correction must remove at step ``n >= 0``.

        All updates so far spanned ``every`` steps. The result is from -64, which stands for a share
        of 0, to 0. A rule without bias correction returns -64.
        """
        return LOG_NEGLIGIBLE

    def weigh(self, n: int, every: int, log_decay: float) -> tuple[float, float]:
        """Return the weight of the new value at ``n``, and ``log_decay`` after this update.

        The updates of the run may span different numbers of steps: this one spans ``every`` steps,
        and the ``log_decay`` passed in is the result of the previous call.
        """
        return self.weight(n, every), log_decay

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values from which :func:`rule_from_dict` rebuilds the rule.

        The dict has an entry ``"rule"``, the name, and the dataclass fields that the constructor
        takes. Rules among the fields become dicts as well, and tuples become lists. The name is the
        class name for rules of fastema and ``module.qualified_name`` for others. Raise an
        ArgumentError if the rule cannot be described this way.
        """
        if not is_dataclass(self):
            raise ArgumentError(
                f"{type(self).__name__} cannot be saved: make it a frozen dataclass, or "
                "override to_dict() to return {'rule': ..., and the constructor's arguments}"
            )
        own = type(self).__name__
        plain = {
            f.name: to_plain_value(getattr(self, f.name), f"{own}.{f.name}")
            for f in fields(self)
            if f.init
        }
        if "rule" in plain:
            raise ArgumentError(
                f"{own}: rename the field 'rule'; a saved rule stores its class name in this entry"
            )
        return {"rule": _name_of(type(self)), **plain}


def _name_of(kind: type[Rule]) -> str:
    ours = kind.__module__.startswith("fastema.rules.")
    return kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}"


def describe_rule(rule: Rule) -> dict[str, Any]:
    """Return :meth:`Rule.to_dict`; raise an ArgumentError if a checkpoint cannot store the rule."""
    plain: dict[str, Any] = to_plain_value(rule.to_dict(), f"{type(rule).__name__}.to_dict()")
    return plain


def to_plain_value(value: Any, place: str) -> Any:
    """Return ``value`` in the types that a checkpoint stores; ``place`` names it in errors.

    NumPy numbers become Python numbers, and tuples become lists.
    """
    if isinstance(value, Rule):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: to_plain_value(one, f"{place}[{key!r}]") for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain_value(one, f"{place}[{i}]") for i, one in enumerate(value)]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    kind = type(value)
    raise ArgumentError(
        f"{place} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot store: "
        "the fields of a rule must be strings, numbers, other rules, or tuples and dicts of them"
    )


def _rebuild_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "rule" in value:
            return rule_from_dict(value)
        return {key: _rebuild_value(one) for key, one in value.items()}
    return tuple(_rebuild_value(one) for one in value) if isinstance(value, tuple | list) else value


def rule_from_dict(plain: Mapping[str, Any]) -> Rule:
    """Return the rule that :meth:`Rule.to_dict` described. Lists become tuples.

    Parameters
    ----------
    plain : mapping
        A dict that :meth:`Rule.to_dict` returned. If the rule is your own class, define or import
        the class, under its old name, before this call.

    Raises
    ------
    ArgumentError
        If the rule is unknown, or its parameters are wrong.
    """
    values = dict(plain) if isinstance(plain, Mapping) else {}
    name = values.pop("rule", None)
    if not isinstance(name, str) or name not in _RULES:
        raise ArgumentError(
            f"unknown rule {name!r}; known rules: {', '.join(sorted(_RULES))}. Define or import "
            "your own rule before loading it"
        )
    try:
        return _RULES[name](**{key: _rebuild_value(value) for key, value in values.items()})
    except TypeError as error:
        raise ArgumentError(f"rule {name}: {error}") from None
