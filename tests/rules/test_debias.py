"""Bias correction against the average that starts from zero."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastema import rules
from fastema.errors import ArgumentError

decays = st.floats(0.0, 0.99999)
inner = st.one_of(
    st.builds(rules.constant, decays),
    st.builds(rules.warmup, decays),
    st.builds(rules.inverse_gamma, decays, st.floats(0.1, 100), st.floats(0.1, 3)),
    st.builds(rules.power, st.floats(0.01, 0.28)),
    st.builds(rules.cumulative_mean),
)


@dataclass(frozen=True)
class Slow(rules.Rule):
    """Takes in little for long, so that the correction matters for long."""

    scale: float

    def decay(self, n: int) -> float:
        return 1.0 - self.scale / (n + 10.0)


@dataclass(frozen=True)
class Late(rules.Rule):
    begin: int

    def decay(self, n: int) -> float:
        return 1.0 if n < self.begin else 0.5


@dataclass(frozen=True)
class Wrong(rules.Rule):
    value: Any

    def decay(self, n: int) -> float:
        return self.value if n > 3 else 0.9


@given(inner, st.integers(1, 10), st.lists(st.integers(-100, 100), min_size=1, max_size=30))
def test_it_is_the_zero_initialised_average_over_what_it_has_seen(
    rule: rules.Rule, every: int, values: list[int]
) -> None:
    corrected = rules.debiased(rule)
    zero, seen = Fraction(0), Fraction(0)
    average = Fraction(10**6)  # what it began with leaves no trace
    for k, value in enumerate(values, 1):
        w = Fraction(rule.weight(k * every, every))
        zero += w * (value - zero)
        seen += w * (1 - seen)
        average += Fraction(corrected.weight(k * every, every)) * (value - average)
    assert float(average) == pytest.approx(float(zero / seen), rel=1e-9, abs=1e-9)


@given(inner, st.integers(1, 10))
def test_the_first_update_copies(rule: rules.Rule, every: int) -> None:
    assert rules.debiased(rule).weight(every, every) == 1.0
    assert rules.debiased(rule).decay(1) == 0.0


@settings(max_examples=30)
@given(
    st.sampled_from([1e-12, 1e-10, 1e-7, 1e-3, 0.5]),
    st.sampled_from([1, 2, 1000, 10**6, 10**9 - 1, 10**9]),
    st.sampled_from([1, 7, 1000]),
)
def test_a_constant_in_closed_form(distance: float, count: int, every: int) -> None:
    decay = 1.0 - distance
    with localcontext() as context:
        context.prec = 60
        exact = (1 - Decimal(decay) ** every) / (1 - Decimal(decay) ** (count * every))
    found = rules.debiased(rules.constant(decay)).weight(count * every, every)
    assert found == pytest.approx(float(exact), rel=1e-13, abs=0.0)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("scale", [0.3, 1e-9])
def test_a_growing_rule_against_exact_products(scale: float, every: int) -> None:
    rule = Slow(scale)
    corrected = rules.debiased(rule)
    with localcontext() as context:
        context.prec = 40
        left = Decimal(1)
        for k in range(1, 3001):
            w = rule.weight(k * every, every)
            left *= 1 - Decimal(w)
            exact = float(Decimal(w) / (1 - left))
            assert corrected.weight(k * every, every) == pytest.approx(exact, rel=1e-12, abs=0.0)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12), st.sampled_from([1, 10]))
def test_any_order_of_steps_gives_the_same_bits(counts: list[int], every: int) -> None:
    corrected = rules.debiased(Slow(0.2))
    for count in counts:
        fresh = rules.debiased(Slow(0.2)).weight(count * every, every)
        assert corrected.weight(count * every, every) == fresh
        corrected.weight(count)  # another stride in between


def test_what_no_longer_counts_is_not_computed() -> None:
    calls: list[int] = []

    @dataclass(frozen=True)
    class Counted(rules.Rule):
        def decay(self, n: int) -> float:
            calls.append(n)
            return 0.5

    rule = rules.debiased(Counted())
    assert rule.weight(10**9) == 0.5
    assert rule.weight(10**9 + 1) == 0.5
    assert len(calls) < 100


def test_threads_get_the_same() -> None:
    steps = list(range(1, 4000, 7))
    expected = [rules.debiased(Slow(0.2)).weight(n) for n in steps]
    shared = rules.debiased(Slow(0.2))
    found: dict[int, list[float]] = {}

    def ask(number: int) -> None:
        order = steps if number % 2 else steps[::-1]
        answers = [shared.weight(n) for n in order]
        found[number] = answers if number % 2 else answers[::-1]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(6), expected)


def test_until_a_rule_takes_something_in_the_average_is_the_weights() -> None:
    rule = rules.debiased(Late(4))
    assert [rule.weight(n) for n in (1, 2, 3, 4)] == [1.0, 1.0, 1.0, 1.0]
    assert rule.weight(5) == pytest.approx(0.5 / 0.75)


def test_twice_is_once() -> None:
    once = rules.debiased(rules.warmup(0.99))
    twice = rules.debiased(once)
    for n in (1, 2, 10, 1000):
        assert twice.weight(n) == pytest.approx(once.weight(n), rel=1e-14, abs=0.0)


@pytest.mark.parametrize("value", [float("nan"), -0.5, 1.5, "x"], ids=repr)
def test_a_rule_that_gives_no_weight_is_named(value: Any) -> None:
    with pytest.raises((ArgumentError, TypeError), match=r"Wrong|unsupported|not supported"):
        rules.debiased(Wrong(value)).weight(10)


@pytest.mark.parametrize("value", [0.9, None, "Constant", rules.Constant], ids=repr)
def test_what_is_no_rule(value: Any) -> None:
    with pytest.raises(ArgumentError, match="rule"):
        rules.debiased(value)


def test_what_was_computed_is_no_part_of_the_rule() -> None:
    one, other = rules.debiased(Slow(0.2)), rules.debiased(Slow(0.2))
    one.weight(1000)
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == repr(other) == "Debiased(inner=Slow(scale=0.2))"
    assert one.to_dict() == other.to_dict()
