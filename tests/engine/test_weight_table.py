"""Weight tables, compared with their rules at every kind of update."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from fastema import rules
from fastema.engine.weight_table import evaluate, weight_table
from fastema.kernels.table import WEIGHT_COLUMNS

LAST = 2**31
CLOSE = 4e-15  # relative error allowed besides the rule's own rounding

Weight = Callable[[int], float]

# Rules whose weight is one minus a decay, which is rounded by up to 2**-54.
BY_DECAY = [
    rules.constant(0.999),
    rules.constant(0.0),
    rules.half_life(693),
    rules.warmup(0.999),
    rules.warmup(0.9999999),
    rules.warmup(0.3),
    rules.inverse_gamma(0.9999),
    rules.inverse_gamma(0.999, power=0.75),
    rules.inverse_gamma(0.99999, inv_gamma=1.0, power=1.0),
    rules.inverse_gamma(0.9999, inv_gamma=5000.0, power=2.0, minimum=0.9),
    rules.inverse_gamma(1 - 2**-53, power=3.0),
    rules.debiased(rules.warmup(0.99999)),
    rules.debiased(rules.inverse_gamma(0.9999)),
    rules.debiased(rules.inverse_gamma(0.9999, minimum=0.99)),
]
# Rules whose weights are accurate to the last digit.
DIRECT = [
    rules.power(0.05),
    rules.power(0.001),
    rules.power(1 / math.sqrt(12)),
    rules.cumulative_mean(),
    rules.window(1),
    rules.window(10),
    rules.window(123_457),
    rules.debiased(rules.constant(0.0)),
    rules.debiased(rules.constant(0.999)),
    rules.debiased(rules.constant(0.9999999)),
    rules.debiased(rules.cumulative_mean()),
    rules.debiased(rules.power(0.05)),
]


def weight_of(rule: rules.Rule, every: int = 1) -> Weight:
    return lambda update: rule.weight(update * every, every)


class CountedWeight:
    """A weight function that counts its calls."""

    def __init__(self, weight: Weight) -> None:
        self.weight, self.calls = weight, 0

    def __call__(self, update: int) -> float:
        self.calls += 1
        return self.weight(update)


def evaluate_many(table: np.ndarray, updates: np.ndarray) -> np.ndarray:
    """Evaluate a table at many updates at once, by its documented formula."""
    rows = table[np.searchsorted(table[:, 0], updates, side="right") - 1]
    t = (updates - rows[:, 0]) * rows[:, 1] - 1.0
    value = rows[:, 13]
    for k in range(12, 1, -1):
        value = value * t + rows[:, k]
    return np.minimum(np.maximum(value, 0.0), 1.0)


def random_updates(seed: int, count: int) -> np.ndarray:
    """Draw random updates, half of them uniformly and half log-uniformly."""
    generator = np.random.default_rng(seed)
    even = generator.integers(1, LAST, count // 2, endpoint=True)
    return np.concatenate((even, (2.0 ** generator.uniform(0, 31, count // 2)).astype(np.int64)))


def row_borders(table: np.ndarray) -> np.ndarray:
    first = table[:, 0].astype(np.int64)
    return np.concatenate((first, first[1:] - 1))


def assert_close(table: np.ndarray, weight: Weight, updates: np.ndarray, rounding: float) -> None:
    want = np.array([weight(update) for update in updates.tolist()])
    errors = np.abs(evaluate_many(table, updates) - want)
    allowed = CLOSE * want + rounding
    worst = np.argmax(errors - allowed)
    assert (errors <= allowed).all(), (
        f"update {updates[worst]}: {want[worst]!r} is {errors[worst]:.2e} off, "
        f"{allowed[worst]:.2e} allowed"
    )


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("rule", [*BY_DECAY, *DIRECT], ids=str)
def test_every_rule_has_a_small_and_accurate_table(rule: rules.Rule, every: int) -> None:
    weight = CountedWeight(weight_of(rule, every))
    table = weight_table(weight)
    assert weight.calls < 60_000
    assert table.dtype == np.float64
    assert table.shape == (len(table), WEIGHT_COLUMNS)
    assert len(table) < 300
    assert table[0, 0] == 1
    assert (np.diff(table[:, 0]) > 0).all()
    assert np.isfinite(table).all()
    many = random_updates(every, 100_000 if every == 1 else 10_000)
    updates = np.concatenate((np.arange(1, 5001), many, row_borders(table), LAST - np.arange(100)))
    assert_close(table, weight, updates, 0.0 if rule in DIRECT else every * 2.0**-52)


def first_where(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the first update from which a lasting condition holds, by bisection."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize(
    "rule",
    [
        rules.warmup(0.999),
        rules.warmup(0.9999999),
        rules.inverse_gamma(0.9999),
        rules.inverse_gamma(0.999, 20.0, 0.75, 0.5),
        rules.inverse_gamma(1 - 1e-10, power=2.0),
        rules.window(1_234_567),
        rules.debiased(rules.warmup(0.999)),
    ],
    ids=str,
)
def test_a_table_is_exact_once_its_rule_is_at_its_limit(rule: rules.Rule, every: int) -> None:
    weight = weight_of(rule, every)
    limit = weight(LAST)
    begins = first_where(lambda update: weight(update) == limit, 1, LAST)
    assert weight(begins - 1) != limit
    table = weight_table(weight)
    assert table[-1, :3].tolist() == [begins, 0.0, limit]
    for update in (begins, begins + 1, 2 * begins, LAST, LAST + 1, 2**40):
        assert evaluate(table, update) == limit
    assert evaluate(table, begins - 1) == pytest.approx(weight(begins - 1), rel=1e-6)


@pytest.mark.parametrize("last", [1, 2, 63, 64, 65, 66, 67, 100, 8191, 12_345])
@pytest.mark.parametrize("rule", [rules.power(0.1), rules.constant(0.9), rules.warmup(0.99)])
def test_a_table_evaluates_no_update_after_the_last_and_keeps_its_weight(
    rule: rules.Rule, last: int
) -> None:
    weight = weight_of(rule)

    def limited(update: int) -> float:
        assert 1 <= update <= last
        return weight(update)

    table = weight_table(limited, last)
    assert_close(table, weight, np.arange(1, last + 1), 2.0**-52)
    for update in (last, last + 1, 2 * last, LAST, 2**52):
        assert evaluate(table, update) == weight(last)
