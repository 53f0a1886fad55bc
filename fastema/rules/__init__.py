"""How much of the new value an average takes in at each step: pure maths, no arrays."""

from fastema.rules.ema import (
    Constant,
    InverseGamma,
    Rule,
    Warmup,
    constant,
    half_life,
    inverse_gamma,
    rule_from_dict,
    warmup,
)
from fastema.rules.schedule import Schedule

__all__ = [
    "Constant",
    "InverseGamma",
    "Rule",
    "Schedule",
    "Warmup",
    "constant",
    "half_life",
    "inverse_gamma",
    "rule_from_dict",
    "warmup",
]
