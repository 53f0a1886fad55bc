"""The expected value of stochastic updates, exactly: counted over all 2**32 random words.

The high bits of a word round to 16 bits, the low bits dither. An update is monotonic in either
part, so binary searches find how many words lead to which of the two neighbors.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
from numba import njit

from fastema.kernels import steps
from fastema.kernels.formats import FORMATS

from ..support import reference

NARROW = ["bf16", "f16"]
STEPS = [0.05, 0.1, 0.5, 1.0, 3.7, 40.0]
"""Distances from the average to the weights, in units of the average's last place."""

Array = np.ndarray
Update = Callable[[Array, Array, Array, Array], Array]


@cache
def update_of(operation: str, code: str, src: str) -> Update:
    """Return ``update(avg, x, w, words)`` on arrays of storage bits."""
    step: Any = getattr(steps, operation)(f"{code}~", src, device="cpu")
    apply, number = step.apply, step.number

    @njit
    def run(out: Array, avg: Array, x: Array, w: Array, words: Array) -> None:
        nothing = np.uint8(0)
        for i in range(len(out)):
            out[i] = apply(avg[i], nothing, x[i], nothing, number(w[i]), words[i])[0]

    def update(avg: Array, x: Array, w: Array, words: Array) -> Array:
        out = np.empty(avg.size, np.uint16)
        x = x.view(np.uint16) if x.itemsize == 2 else x
        run(out, avg.view(np.uint16), x, w, words)
        return out.view(reference.FLOATS[code].storage)

    return update


def search(limit: int, reaches: Callable[[Array], Array], size: int) -> Array:
    """Return the smallest number in [0, limit] for which ``reaches`` holds, for each update."""
    low, high = np.zeros(size, np.int64), np.full(size, limit)
    while (low < high).any():
        middle = (low + high) // 2
        found = reaches(middle)
        low, high = np.where(found | (low >= high), low, middle + 1), np.where(found, middle, high)
    return high


def expected_values(
    update: Update, code: str, avg: Array, x: Array, w: Array, negative: Array
) -> tuple[Array, Array, list[Fraction]]:
    """Return the smallest and the largest magnitude of each update, and its expected value."""
    dither = FORMATS[f"{code}~"].dither
    assert dither is not None
    highs, lows = 1 << dither.used, 1 << (32 - dither.used)
    sign_bit = np.where(negative, (lows - 1) >> 1, lows >> 1)  # more moves away from 0

    def result(high: Array, low: Array) -> Array:
        words = np.asarray(high * lows + (np.minimum(low, lows - 1) ^ sign_bit), np.uint32)
        return np.abs(reference.decode(update(avg, x, w, words), code))

    none, full = np.zeros(avg.size, np.int64), np.full(avg.size, lows - 1)
    first, last = result(none, none), result(np.full(avg.size, highs - 1), full)

    def up(high: Array, low: Array) -> Array:
        return (result(np.minimum(high, highs - 1), low) > first) | (high >= highs)

    always = search(highs, lambda high: up(high, none), avg.size)
    sometimes = search(highs, lambda high: up(high, full), avg.size)
    count = (highs - always) * lows
    assert (always - sometimes <= 4).all()
    for k in range(4):
        high = np.minimum(sometimes + k, highs - 1)
        from_low = search(lows, lambda low, high=high: up(high, low) | (low >= lows), avg.size)
        count += np.where(sometimes + k < always, lows - from_low, 0)
    means = [
        Fraction(a) + (Fraction(b) - Fraction(a)) * Fraction(int(n), 2**32)
        for a, b, n in zip(first, last, count, strict=True)
    ]
    return first, last, means


def last_place(values: Array, code: str) -> Array:
    form = reference.FLOATS[code]
    _, exponent = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponent, form.lowest + 1) - form.digits)


def averages(code: str) -> Array:
    """Return averages of every size: powers of two, neighbors, random, subnormal, the largest."""
    form = reference.FLOATS[code]
    random = np.random.default_rng(3)
    powers = 2.0 ** np.array([form.lowest, form.lowest + 1, -5, -1, 0, 1, form.highest])
    others = np.ldexp(1 + random.random(12), random.integers(form.lowest, form.highest - 1, 12))
    subnormal = form.smallest * np.array([1, 2, 3, 2 ** (form.digits - 1) - 1])
    sizes = np.concatenate([powers, powers * (1 - 2.0**-form.digits), others, subnormal])
    return reference.encode(np.concatenate([sizes, -sizes]), code)


def cases(code: str, src: str, seed: int) -> tuple[Array, Array, Array]:
    """Return averages, weights of the model and weights of the update."""
    stored = averages(code)
    known = reference.decode(stored, code)
    away = np.array([side * step for step in STEPS for side in (1, -1)])
    x = reference.encode(
        (known[:, None] + away * last_place(known, code)[:, None]).reshape(-1), src
    )
    avg = np.repeat(stored, away.size)
    w = 10 ** np.random.default_rng(seed).uniform(-6, -0.5, avg.size)
    w[::7] = 1e-6
    w = w.astype(np.float32).astype(np.float64) if src != "f64" else w
    largest = reference.FLOATS[code].largest
    inside = np.abs(reference.decode(x, src)) <= largest
    return avg[inside], x[inside], w[inside]


def exact(numbers: Array) -> list[Fraction]:
    return [Fraction(float(one)) for one in numbers]


@pytest.mark.parametrize("src", ["f32", "f64"])
@pytest.mark.parametrize("code", NARROW)
def test_the_expected_value_of_small_steps_is_exact(code: str, src: str) -> None:
    avg, x, w = cases(code, src, 1)
    old, new, weight = (
        exact(one) for one in (reference.decode(avg, code), reference.decode(x, src), w)
    )
    moved = [c * (b - a) for a, b, c in zip(old, new, weight, strict=True)]
    y = [a + step for a, step in zip(old, moved, strict=True)]
    negative = np.array([one < 0 for one in y])
    update = update_of("lerp", code, src)
    first, last, means = expected_values(update, code, avg, x, w, negative)
    place = last_place(first, code)
    assert (last - first <= place).all()
    for step, want, small, large, mean in zip(moved, y, first, last, means, strict=True):
        assert Fraction(small) <= abs(want) <= Fraction(large)
        assert abs(mean - abs(want)) <= abs(step) / 100


def numbers(code: str, size: int, seed: int, lowest: int, highest: int) -> Array:
    """Return random stored numbers of either sign with exponents in a range."""
    random = np.random.default_rng(seed)
    sizes = np.ldexp(1 + random.random(size), random.integers(lowest, highest + 1, size))
    return reference.encode(sizes * random.choice([-1, 1], size), code)


def weights(size: int, seed: int) -> Array:
    """Return float32 weights: tiny, small, near 1, and simple fractions."""
    random = np.random.default_rng(seed)
    w = np.concatenate([10 ** random.uniform(-6, -0.01, size), 1 - 10 ** random.uniform(-6, -1, 9)])
    w = random.permutation(np.append(w, [2.0**-24, 1 - 2.0**-24, 0.5, 0.25, 0.75, 1.0] * 3))[:size]
    return w.astype(np.float32).astype(np.float64)


def from_zero(code: str, src: str) -> tuple[Array, Array, Array]:
    form = reference.FLOATS[code]
    avg = reference.encode(np.resize([0.0, -0.0], 120), code)
    lowest = form.lowest - (form.digits - 3)
    return avg, numbers(src, 120, 5, lowest, form.highest - 1), weights(120, 6)


def across_zero(code: str, src: str) -> tuple[Array, Array, Array]:
    """Return steps to exactly 0, to near 0 on either side, and far beyond."""
    form = reference.FLOATS[code]
    avg = numbers(code, 150, 7, form.lowest + 2, form.highest - 8)
    known = reference.decode(avg, code)
    w = weights(150, 8)
    w[:60] = np.resize([0.5, 0.25, 0.75, 0.125], 60)
    w = np.maximum(w, 2.0**-6)
    x = known - known / w
    x[60:] *= np.random.default_rng(9).choice([1, 1.001, 0.999, 1.5, 3], 90)
    return avg, reference.encode(x, src), w


def subnormal(code: str, src: str) -> tuple[Array, Array, Array]:
    form = reference.FLOATS[code]
    random = np.random.default_rng(10)
    avg = reference.encode(
        form.smallest * random.integers(-(2 ** (form.digits - 1)), 20, 120), code
    )
    x = reference.decode(avg, code) + form.smallest * random.uniform(-40, 40, 120)
    w = weights(120, 11)
    return avg, reference.encode(x, src), np.maximum(w, 2.0**-13)


def large_steps(code: str, src: str) -> tuple[Array, Array, Array]:
    """Return steps of one place, a few places, and above twice the average."""
    form = reference.FLOATS[code]
    avg = numbers(code, 150, 12, form.lowest + 4, form.highest - 6)
    factors = np.random.default_rng(13).choice([-20, -3, -1.5, -1, 0.5, 0.99, 1.02, 1.5, 4], 150)
    x = reference.encode(reference.decode(avg, code) * factors, src)
    return avg, x, weights(150, 14)


def largest(code: str, src: str) -> tuple[Array, Array, Array]:
    """Return averages and weights of the model up to the largest, of equal or opposite signs."""
    form = reference.FLOATS[code]
    avg, x = (form.largest * np.random.default_rng(15).uniform(-1, 1, (2, 120))) * (1 - 2.0**-9)
    avg[::4], x[::3] = form.largest, -form.largest
    return (
        reference.encode(avg, code),
        reference.encode(x, src),
        np.maximum(weights(120, 17), 2.0**-20),
    )


AREAS = (from_zero, across_zero, subnormal, large_steps, largest)


def check_means(
    operation: str, code: str, src: str, avg: Array, x: Array, w: Array, share: float = 0.01
) -> None:
    """Assert that updates round to the two neighbors of the exact value, which is expected."""
    old, new, weight = (
        exact(one) for one in (reference.decode(avg, code), reference.decode(x, src), w)
    )
    pairs = list(zip(old, new, weight, strict=True))
    moved = [c * (b - a if operation == "lerp" else b) for a, b, c in pairs]
    y = [a + step for a, step in zip(old, moved, strict=True)]
    negative = np.array([one < 0 for one in y])
    update = update_of(operation, code, src)
    first, last, means = expected_values(update, code, avg, x, w, negative)
    assert np.isfinite(last).all()
    place = last_place(np.array([float(abs(one)) for one in y]), code)
    assert (last - first <= place).all()
    for step, want, small, large, mean in zip(moved, y, first, last, means, strict=True):
        rounding = max(
            abs(step) / 2**22, Fraction(2.0**-148)
        )  # float32's own, where it is computed
        assert Fraction(small) - rounding <= abs(want) <= Fraction(large) + rounding
        assert abs(mean - abs(want)) <= abs(step) * Fraction(share)


@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("src", ["f32", "f64", "same"])
@pytest.mark.parametrize("code", NARROW)
def test_the_expected_value_is_exact_everywhere(
    code: str, src: str, area: Callable[[str, str], tuple[Array, Array, Array]]
) -> None:
    src = code if src == "same" else src
    check_means("lerp", code, src, *area(code, src))


@pytest.mark.parametrize("area", [from_zero, across_zero, subnormal, large_steps])
@pytest.mark.parametrize("src", ["f32", "f64", "same"])
@pytest.mark.parametrize("code", NARROW)
def test_the_expected_value_of_sums_is_exact(
    code: str, src: str, area: Callable[[str, str], tuple[Array, Array, Array]]
) -> None:
    src = code if src == "same" else src
    check_means("add", code, src, *area(code, src))


def run_words(operation: str, code: str, src: str, avg: float, x: float, w: float) -> Array:
    """Return the results of an update for words at both ends and random ones."""
    words = np.random.default_rng(18).integers(0, 2**32, 1000, np.uint32)
    words[:4] = 0, 2**32 - 1, 2**31, 2**31 - 1
    stored = reference.encode(np.full(1000, avg), code)
    new = reference.encode(np.full(1000, x), src)
    got = update_of(operation, code, src)(stored, new, np.full(1000, w), words)
    return reference.decode(got, code)


@pytest.mark.parametrize("src", ["f32", "f64", "same"])
@pytest.mark.parametrize("code", NARROW)
def test_infinities_and_nan_follow_from_the_formula(code: str, src: str) -> None:
    src = code if src == "same" else src
    inf, nan, most = np.inf, np.nan, reference.FLOATS[code].largest
    for w in (2.0**-24, 0.01, 0.5, 1 - 2.0**-24):
        for a, x, want in [
            (1, inf, inf), (most, -inf, -inf), (0, inf, inf), (inf, 1, nan), (inf, inf, nan),
            (inf, -inf, nan), (nan, 1, nan), (1, nan, nan), (inf, nan, nan), (nan, inf, nan),
        ]:  # fmt: skip
            np.testing.assert_array_equal(run_words("lerp", code, src, a, x, w), want)
        for a, x, want in [
            (inf, 1, inf), (-inf, most, -inf), (inf, inf, inf), (inf, -inf, nan), (1, inf, inf),
            (1, -inf, -inf), (nan, 1, nan), (1, nan, nan), (inf, 0, inf),
        ]:  # fmt: skip
            np.testing.assert_array_equal(run_words("add", code, src, a, x, w), want)
    for a in (1, inf, -inf, nan, most):
        for x in (0.0, 1.5, most, inf, -inf, nan):
            np.testing.assert_array_equal(run_words("lerp", code, src, a, x, 1.0), x)


@pytest.mark.parametrize("src", ["f32", "f64", "same"])
@pytest.mark.parametrize("code", NARROW)
def test_sums_beyond_the_largest_number_round_as_the_format_does(code: str, src: str) -> None:
    src = code if src == "same" else src
    most = reference.FLOATS[code].largest
    place = last_place(np.array([most]), code)[0]
    # bfloat16 stays finite; half precision rounds to nearest there
    for share, want in ((0.25, most), (0.75, most if code == "bf16" else np.inf)):
        for sign in (1, -1):
            got = run_words("add", code, src, sign * most, sign * place, share)
            np.testing.assert_array_equal(got, sign * want)


@pytest.mark.parametrize("src", ["f32", "f64", "same"])
@pytest.mark.parametrize("code", NARROW)
def test_an_average_equal_to_the_weights_stays(code: str, src: str) -> None:
    src = code if src == "same" else src
    avg = averages(code)
    for w in (0.0, 2.0**-30, 2.0**-24, 1e-6, 0.3, 0.5, 1 - 2.0**-24, 1.0):
        for word in (0, 2**32 - 1, 2**31, 2**31 - 1, 0x7FFF, 0x8000, 0xFFFF8000, 0xFFFF7FFF):
            words = np.full(avg.size, word, np.uint32)
            x = reference.cast(avg, code, src)
            got = update_of("lerp", code, src)(avg, x, np.full(avg.size, w), words)
            np.testing.assert_array_equal(reference.decode(got, code), reference.decode(avg, code))
