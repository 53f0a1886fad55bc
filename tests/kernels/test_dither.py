"""The expected value of stochastic updates, exactly: counted over all 2**32 random words.

The high bits of a word round to 16 bits, the low bits dither. An update is monotonic in either
part, so binary searches find how many words lead to which of the two neighbors.
"""

from collections.abc import Callable
from fractions import Fraction
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
