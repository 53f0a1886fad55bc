"""Argument checks that return a float or an int, or raise :class:`ArgumentError`."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from fastema.errors import ArgumentError

__all__ = [
    "MAX_STEPS",
    "decay_error",
    "validate_at_least",
    "validate_decay",
    "validate_int",
    "validate_positive",
    "validate_weight",
]

MAX_STEPS = 2**63 - 1
"""The largest step count: kernels and checkpoints store it in a signed 64-bit integer."""


def _number(value: Any) -> float:
    """Return a real number as a float, and NaN for anything else so that comparisons fail."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def validate_decay(decay: Any, name: str = "decay") -> float:
    """Return ``decay`` as a float; raise an ArgumentError unless it is in [0, 1)."""
    value = _number(decay)
    if not 0.0 <= value < 1.0:
        raise decay_error(decay, name)
    return value


def decay_error(found: Any, name: str = "decay") -> ArgumentError:
    """Return the error for a value that is neither a decay nor a rule."""
    expected = "a number in [0, 1); it is the weight of the old average, for example 0.999"
    if callable(found):
        expected = (
            "a number in [0, 1) or a rule, not a function or class: call one of fastema.rules, "
            "such as fastema.rules.warmup(0.999), or write a fastema.rules.Rule with the method "
            "decay(n) for a schedule of your own"
        )
    return ArgumentError(f"{name}={found!r}: expected {expected}")


def validate_positive(number: Any, name: str) -> float:
    """Return ``number`` as a float; raise an ArgumentError unless it is finite and above 0."""
    value = _number(number)
    if not 0.0 < value < math.inf:
        raise ArgumentError(f"{name}={number!r}: expected a finite number above 0")
    return value


def validate_at_least(number: Any, name: str, least: float) -> float:
    """Return ``number`` as a float; raise an ArgumentError unless it is finite and >= ``least``."""
    value = _number(number)
    if not least <= value < math.inf:
        raise ArgumentError(f"{name}={number!r}: expected a finite number of at least {least:g}")
    return value


def validate_int(number: Any, name: str, least: int, most: int = MAX_STEPS) -> int:
    """Return ``number`` as an int; raise an ArgumentError unless it is in [``least``, ``most``].

    Floats are rejected, also whole ones.
    """
    if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
        raise ArgumentError(f"{name}={number!r}: expected a whole number of at least {least}")
    if int(number) > most:
        raise ArgumentError(f"{name}={number!r}: expected a whole number of at most {most}")
    return int(number)


def validate_weight(weight: Any, rule: object, step: int) -> float:
    """Return a rule's weight of the new value as a float; raise an ArgumentError if not in [0, 1].

    The error names the rule and the step.
    """
    # Fast path, taken at every training step.
    if type(weight) is float and 0.0 <= weight <= 1.0:
        return weight
    value = _number(weight)
    if not 0.0 <= value <= 1.0:
        raise ArgumentError(
            f"{rule!r} gives the new value the weight {weight!r} at step {step}: expected a number "
            "in [0, 1], which is 1 - decay"
        )
    return value
