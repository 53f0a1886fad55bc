"""Schedules: their numbers, text, plain form and reach."""

from typing import Any

from fastema import rules

from ..cases import Cases, case
from ..record import attempt

CASES: Cases = {}
RTOL = 1e-11

RULES = {
    "constant": lambda: rules.constant(0.95),
    "constant 0": lambda: rules.constant(0.0),
    "half_life": lambda: rules.half_life(7),
    "half_life_fraction": lambda: rules.half_life_fraction(0.1),
    "inverse_gamma": lambda: rules.inverse_gamma(0.99, 2.0, 0.75, 0.1),
    "inverse_gamma default": rules.inverse_gamma,
    "power": lambda: rules.power(0.1),
    "warmup": lambda: rules.warmup(0.99),
    "cumulative_mean": rules.cumulative_mean,
    "window": lambda: rules.window(5),
    "debiased": lambda: rules.debiased(rules.constant(0.9)),
    "debiased warmup": lambda: rules.debiased(rules.warmup(0.9)),
}
_STEPS = (1, 2, 3, 5, 10, 100, 12_345, 10**9)


@case(CASES, rtol=RTOL, rule=RULES)
def numbers_of_rules(rule: Any) -> Any:
    one = rule()
    return {
        "repr": repr(one),
        "plain": one.to_dict(),
        "decay": {n: attempt(lambda n=n: one.decay(n)) for n in _STEPS},
        "weight": {f"{n} {k}": one.weight(n, k) for n in _STEPS for k in (1, 2, 7)},
        "rebuilt": rules.rule_from_dict(one.to_dict()) == one,
        "reach": {n: attempt(lambda n=n: rules.effective_steps(one, n)) for n in (1, 10, 1000)},
    }


@case(CASES, rtol=RTOL, rule=RULES, every=(1, 4), after=(0, 6))
def weights_of_schedules(rule: Any, every: int, after: int) -> Any:
    one = rules.Schedule([rule()], update_every=every, start_after=after)
    return {
        "repr": repr(one),
        "plain": one.to_dict(),
        "weights": {n: attempt(lambda n=n: one.weights(n)) for n in (1, 2, 4, 6, 7, 8, 12, 50)},
        "rebuilt": rules.Schedule.from_dict(one.to_dict()) == one,
    }


@case(CASES, rtol=1e-9, value=(0.01, 0.05, 0.1, 0.2))
def power_exponents(value: float) -> Any:
    gamma = rules.gamma_of(value)
    return {"gamma": gamma, "back": rules.sigma_rel_of(gamma)}
