"""Rolling and exponential means of long series, rounded once however the series is divided."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from fastema.engine import series

Floats = NDArray[np.float64]

SIZES = (1, 2, 3, 10, 63, 64, 65, 255, 256, 257, 1_000)
NOTHING = np.empty(0)


def expected_windows(x: Floats, history: Floats, size: int, mean: bool) -> Floats:
    """Return rolling sums or means by their definition, each sum rounded once."""
    values = np.concatenate([history, x]).tolist()
    found = []
    for end in range(len(history) + 1, len(values) + 1):
        window = values[max(0, end - size) : end]
        found.append(math.fsum(window) / (len(window) if mean else 1))
    return np.array(found)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mean", [False, True])
def test_rolling_sums_are_rounded_once(size: int, mean: bool) -> None:
    rng = np.random.default_rng(size)
    for n in (0, 1, 5, size - 1, size, size + 1, 3 * size + 7, 2_000):
        for before in {0, 1, size // 2, size}:
            x = rng.normal(size=n) * 10.0 ** rng.integers(-6, 6, n)
            both = np.concatenate([rng.normal(size=100), rng.normal(size=before), x])
            history = both[100 : 100 + before]  # earlier memory must not count
            found, finite = series.rolling_mean(both[100 + before :], history, size, divide=mean)
            assert finite
            # Sums of mixed signs may cancel, hence the absolute tolerance.
            want = expected_windows(x, history, size, mean)
            np.testing.assert_allclose(found, want, rtol=2.3e-16, atol=1e-22)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 7, 300, 70_000])
def test_rows_of_different_threads_join_seamlessly(
    size: int, workers: int, threads: Callable[[int], None]
) -> None:
    n = 1_300_003
    x = np.random.default_rng(size).lognormal(0.0, 2.0, n)
    threads(workers)
    found, _ = series.rolling_mean(x, NOTHING, size, divide=True)
    # Around the starts of rows and lanes, and at random places.
    row = max(series._ROW, series._WINDOWS * size)
    edges = [size + k * row + d for k in range(50) for d in (-1, 0, 1)]
    edges += [size + k * row // 4 + d for k in range(200) for d in (-1, 0, 1)]
    anywhere = np.random.default_rng(workers).integers(1, n, 60).tolist()
    for end in [*edges, *anywhere, n, n - 1, n - 2, n - 3]:
        if 0 < end <= n:
            window = x[max(0, end - size) : end]
            expected = math.fsum(window) / len(window)
            assert abs(found[end - 1] - expected) <= math.ulp(expected), end


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_an_exponential_mean_is_exact_and_resumes(decay: float) -> None:
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
    none, same = series.ewm_mean(NOTHING, decay, state)
    assert (none.tolist(), same) == ([], state)
    second, _ = series.ewm_mean(x[701:], decay, state)
    np.testing.assert_array_equal(np.concatenate([first, second]), found)


SHARED = """
    from concurrent.futures import ThreadPoolExecutor
    import numpy as np
    import fastema
    from fastema.engine import series

    def all_means():
        means = [series.rolling_mean(x, np.empty(0), n, divide=True)[0] for n in (1, 2, 7, 300)]
        return [*means, series.ewm_mean(x, 0.9, (0.0, 0.0))[0]]

    x = np.random.default_rng(0).lognormal(0.0, 2.0, 200_003)
    fastema.set_num_threads(1)
    expected = all_means()
    fastema.set_num_threads(3)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: all_means(), range(20)):
            for one, other in zip(found, expected):
                np.testing.assert_array_equal(one, other)
"""


@pytest.mark.slow
def test_scratch_memory_is_not_freed_while_in_use(python: Callable[..., str]) -> None:
    """With one malloc arena, memory that one thread frees goes to the next."""
    python(SHARED, MALLOC_ARENA_MAX="1")
