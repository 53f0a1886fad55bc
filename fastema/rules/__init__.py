"""Rules for the weight of the new value in an average at each step: pure maths, no arrays.

For profiles of averages and their synthesis from snapshots, see :mod:`fastema.rules.posthoc`.
"""

from fastema.rules import units
from fastema.rules.debias import Debiased, debiased
from fastema.rules.ema import (
    Aligned,
    Constant,
    HalfLifeFraction,
    InverseGamma,
    Warmup,
    constant,
    half_life,
    half_life_fraction,
    inverse_gamma,
    warmup,
)
from fastema.rules.means import CumulativeMean, Window, cumulative_mean, window
from fastema.rules.power import Power, gamma_of, power, sigma_rel_of
from fastema.rules.reach import Reach, effective_steps
from fastema.rules.rule import Rule, rule_from_dict
from fastema.rules.schedule import Schedule

__all__ = [
    "Aligned",
    "Constant",
    "CumulativeMean",
    "Debiased",
    "HalfLifeFraction",
    "InverseGamma",
    "Power",
    "Reach",
    "Rule",
    "Schedule",
    "Warmup",
    "Window",
    "constant",
    "cumulative_mean",
    "debiased",
    "effective_steps",
    "gamma_of",
    "half_life",
    "half_life_fraction",
    "inverse_gamma",
    "power",
    "rule_from_dict",
    "sigma_rel_of",
    "units",
    "warmup",
    "window",
]
