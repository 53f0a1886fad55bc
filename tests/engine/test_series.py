from __future__ import annotations

import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import fastema
from fastema.engine import series

Floats = NDArray[np.float64]

SIZES = (1, 2, 3, 10, 63, 64, 65, 255, 256, 257, 1_000)


def windows(x: Floats, history: Floats, size: int, mean: bool) -> Floats:
    """The definition, each sum rounded once."""
    values = np.concatenate([history, x]).tolist()
    found = []
    for end in range(len(history) + 1, len(values) + 1):
        window = values[max(0, end - size) : end]
        total = math.fsum(window)
        found.append(total / len(window) if mean else total)
    return np.array(found)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mean", [False, True])
def test_sums_are_rounded_once(size: int, mean: bool) -> None:
    rng = np.random.default_rng(size)
    for n in (0, 1, 5, size - 1, size, size + 1, 3 * size + 7, 2_000):
        for before in {0, 1, size // 2, size}:
            x = rng.normal(size=n) * 10.0 ** rng.integers(-6, 6, n)
            history = rng.normal(size=before)
            found, finite = series.rolling_mean(x, history, size, divide=mean)
            expected = windows(x, history, size, mean)
            assert finite
            # With both signs a window's sum may cancel: relative to what is added up then.
            np.testing.assert_allclose(found, expected, rtol=2.3e-16, atol=1e-22)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 7, 300, 70_000])
def test_rows_join(size: int, threads: int) -> None:
    n = 1_300_003
    x = np.random.default_rng(size).lognormal(0.0, 2.0, n)
    before = fastema.get_num_threads()
    fastema.set_num_threads(threads)
    try:
        found, _ = series.rolling_mean(x, np.empty(0), size, divide=True)
    finally:
        fastema.set_num_threads(before)
    rng = np.random.default_rng(threads)
    # Where rows and lanes begin, and anywhere.
    row = max(series._ROW, series._WINDOWS * size)
    edges = [size + k * row + d for k in range(50) for d in (-1, 0, 1)]
    edges += [size + k * row // 4 + d for k in range(200) for d in (-1, 0, 1)]
    for end in [*edges, *rng.integers(1, n, 60).tolist(), n, n - 1, n - 2, n - 3]:
        if 0 < end <= n:
            window = x[max(0, end - size) : end]
            expected = math.fsum(window) / len(window)
            assert abs(found[end - 1] - expected) <= math.ulp(expected), end


@pytest.mark.parametrize("size", [5, 1_000])
@pytest.mark.parametrize("spike", [1e30, -1e250, 1e17])
def test_a_spike_leaves_no_trace(size: int, spike: float) -> None:
    n = 400_000
    x = np.random.default_rng(1).uniform(1e-3, 1.0, n)
    places = [3, size, series._ROW, 131_072, 200_001, 399_000]
    x[places] = spike
    found, finite = series.rolling_mean(x, np.empty(0), size, divide=False)
    assert finite
    for place in places:
        for end in (place + 1, place + 2, place + size, place + size + 1, place + size + 90):
            if end <= n:
                expected = math.fsum(x[max(0, end - size) : end])
                assert abs(found[end - 1] - expected) <= math.ulp(expected), (place, end)


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("size", [1, 6, 400])
def test_what_is_not_finite_stays_as_long_as_it_is_in_the_window(size: int, odd: float) -> None:
    n = 300_000
    clean = np.random.default_rng(2).uniform(0.5, 1.5, n)
    x = clean.copy()
    places = [0, 1, size, 131_072 + size, 250_003]
    x[places] = odd
    found, finite = series.rolling_mean(x, np.empty(0), size, divide=True)
    spoilt = np.zeros(n, bool)
    for place in places:
        spoilt[place : place + size] = True
    assert not finite
    np.testing.assert_array_equal(found[spoilt], np.full(spoilt.sum(), odd))
    expected, _ = series.rolling_mean(clean, np.empty(0), size, divide=True)
    grown = np.flatnonzero(~spoilt)[np.flatnonzero(~spoilt) >= size]
    np.testing.assert_allclose(found[grown], expected[grown], rtol=4e-16)


def test_infinities_of_both_signs() -> None:
    x = np.array([1.0, math.inf, 2.0, -math.inf, 3.0, 4.0, 5.0])
    found, _ = series.rolling_mean(x, np.empty(0), 3, divide=False)
    np.testing.assert_equal(found, [1.0, math.inf, math.inf, math.nan, -math.inf, -math.inf, 12.0])


def test_zeros_and_signs() -> None:
    rng = np.random.default_rng(4)
    for x in (
        np.zeros(300_000),
        np.where(rng.random(300_000) < 1e-4, 1.0, 0.0),
        rng.choice([-1.0, 1.0], 300_000),
    ):
        found, finite = series.rolling_mean(x, np.empty(0), 50, divide=False)
        assert finite
        np.testing.assert_array_equal(found, np.convolve(x, np.ones(50))[: len(x)].round())


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_decayed_is_exact(decay: float) -> None:
    rng = np.random.default_rng(int(decay * 1000))
    x = rng.normal(size=1_500) * 10.0 ** rng.integers(-4, 4, 1_500)
    exact = Fraction(0.25)
    expected = []
    for value in x.tolist():
        exact = Fraction(decay) * exact + (1 - Fraction(decay)) * Fraction(value)
        exact = Fraction(round(exact * 2**240), 2**240)
        expected.append(float(exact))
    found, _ = series.ewm_mean(x, decay, (0.25, 0.0))
    np.testing.assert_allclose(found, expected, rtol=2.3e-16, atol=1e-26)
    first, state = series.ewm_mean(x[:701], decay, (0.25, 0.0))
    second, _ = series.ewm_mean(x[701:], decay, state)
    np.testing.assert_array_equal(np.concatenate([first, second]), found)


def test_decayed_of_nothing() -> None:
    found, state = series.ewm_mean(np.empty(0), 0.9, (1.5, 1e-20))
    assert found.tolist() == []
    assert state == (1.5, 1e-20)


def test_memory_before_a_series_is_not_taken_for_its_past() -> None:
    both = np.random.default_rng(0).normal(size=1_000)
    history, x = both[:100], both[100:]  # the values before it in memory, but only 3 count
    found, _ = series.rolling_mean(x, history[-3:], 100, divide=True)
    expected = windows(x, history[-3:], 100, True)
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-17)


def test_sums_near_the_largest_float() -> None:
    x = np.random.default_rng(6).uniform(-1.0, 1.0, 300_000) * 1e307
    found, finite = series.rolling_mean(x, np.empty(0), 10, divide=True)
    assert finite
    expected = windows(x[-5_000:], x[-5_010:-5_000], 10, True)
    np.testing.assert_allclose(found[-5_000:], expected, rtol=1e-13, atol=1e291)


def test_sums_of_the_smallest_floats() -> None:
    x = np.random.default_rng(6).integers(-9, 10, 300_000) * 5e-324
    found, _ = series.rolling_mean(x, np.empty(0), 10, divide=False)
    np.testing.assert_array_equal(found[-5_000:], windows(x[-5_000:], x[-5_010:-5_000], 10, False))


SHARED = """
import numpy as np
import fastema
from concurrent.futures import ThreadPoolExecutor
from fastema.engine import series

fastema.set_num_threads(1)
x = np.random.default_rng(0).lognormal(0.0, 2.0, 200_003)
sizes = (1, 2, 7, 300)
expected = {size: series.rolling_mean(x, np.empty(0), size, divide=True)[0] for size in sizes}
decayed, _ = series.ewm_mean(x, 0.9, (0.0, 0.0))
fastema.set_num_threads(3)

def work(i):
    size = sizes[i % 4]
    np.testing.assert_array_equal(
        series.rolling_mean(x, np.empty(0), size, divide=True)[0], expected[size]
    )
    np.testing.assert_array_equal(series.ewm_mean(x, 0.9, (0.0, 0.0))[0], decayed)

with ThreadPoolExecutor(4) as pool:
    list(pool.map(work, range(80)))
"""


@pytest.mark.slow
def test_scratch_memory_is_not_given_to_others_meanwhile() -> None:
    """All threads take their memory from one place: what one frees the next one gets."""
    root = str(Path(fastema.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SHARED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
