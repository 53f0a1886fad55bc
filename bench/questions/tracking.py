"""Measure moving averages of numbers, one by one and as series.

Single updates are compared with handwritten averages of a loss. Whole series are compared with
libraries; each time is listed with the error of the result.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import bottleneck
import numpy as np
import pandas as pd
import polars as pl
from numpy.typing import NDArray
from scipy.signal import lfilter

from bench.race.contest import contest
from bench.race.durations import summarize_times
from bench.race.question import Question, Settings
from bench.race.report import Figure, Row, Rows
from fastema.cli.clock import interleave
from fastema.tracking import ExponentialMovingAverage, SimpleMovingAverage

WINDOWS, DECAYS = (10, 1_000, 100_000), (0.9, 0.999)
Floats = NDArray[np.float64]
Update = Callable[[float], float]
Series = Callable[[Floats], Floats]


# -- one by one ------------------------------------------------------------------------------------


def _list(window: int) -> Update:
    values: list[float] = []

    def update(x: float) -> float:
        values.append(x)
        del values[:-window]
        return float(np.mean(values))

    return update


def _deque(window: int) -> Update:
    values: deque[float] = deque(maxlen=window)

    def update(x: float) -> float:
        values.append(x)
        return sum(values) / len(values)

    return update


def _running(window: int) -> Update:
    values: deque[float] = deque()
    total = 0.0

    def update(x: float) -> float:
        nonlocal total
        values.append(x)
        total += x
        if len(values) > window:
            total -= values.popleft()
        return total / len(values)

    return update


ONE_BY_ONE: dict[str, Callable[[int], Update]] = {
    "fastema.tracking.SimpleMovingAverage": lambda window: SimpleMovingAverage(window).update,
    "list, np.mean": _list,
    "deque, sum": _deque,
    "deque, running sum": _running,
}

OF_DECAY: dict[str, Callable[[], Update]] = {
    "ExponentialMovingAverage(0.9)": lambda: ExponentialMovingAverage(0.9).update,
    "the same, debiased": lambda: ExponentialMovingAverage(0.9, debias=True).update,
}


def losses(n: int, *, wild: bool) -> Floats:
    """Return a falling, noisy loss; if `wild`, with spikes of 3 to 9 orders of magnitude."""
    rng = np.random.default_rng(0)
    x = (0.2 + 2.0 * np.exp(-np.arange(n) / (n / 5))) * rng.gamma(4.0, 0.25, n)
    if wild:
        places = rng.integers(0, n, max(1, n // 10_000))
        x[places] *= 10.0 ** rng.uniform(3.0, 9.0, len(places))
    return x


def _repeat_update(update: Update, x: list[float], count: int) -> Callable[[], None]:
    """Return a function that does `count` updates, with different values in each call."""
    place = 0

    def run() -> None:
        nonlocal place
        for value in x[place : place + count]:
            update(value)
        place = (place + count) % (len(x) - count)

    return run


def time_single_updates(rounds: int, budget_s: float) -> Iterator[Row]:
    """Yield the time of one update with a full window."""
    x = losses(400_000, wild=False).tolist()
    for window in WINDOWS:
        jobs, counts = {}, {}
        for name, make in ONE_BY_ONE.items():
            update = make(window)
            slow = name in ("list, np.mean", "deque, sum") and window > 100
            # Fill slow entries' windows directly: their updates take time proportional to the
            # window.
            _fill_window(update, x[:window], slow)
            counts[name] = 20 if slow and window > 10_000 else 500 if slow else 50_000
            jobs[name] = _repeat_update(update, x, counts[name])
        for name, times in interleave(jobs, rounds, budget_s=budget_s).items():
            figures = summarize_times(times, "us", counts[name])
            yield Row(f"An update, window {window:,}", name, figures)
    jobs = {name: _repeat_update(make(), x, 50_000) for name, make in OF_DECAY.items()}
    for name, times in interleave(jobs, rounds).items():
        yield Row("An update, any decay", name, summarize_times(times, "us", 50_000))


def _fill_window(update: Update, x: list[float], slow: bool) -> None:
    cells = [cell.cell_contents for cell in getattr(update, "__closure__", None) or ()]
    kept = next((cell for cell in cells if isinstance(cell, list | deque)), None)
    if slow and kept is not None:
        kept.extend(x)
        return
    for value in x:
        update(value)


def drift(n: int, window: int = 100) -> Iterator[Row]:
    """Yield the relative error of averages after `n` updates with spikes."""
    x = losses(n, wild=True).tolist()
    exact = math.fsum(x[-window:]) / window
    for name in ("fastema.tracking.SimpleMovingAverage", "deque, running sum"):
        update = ONE_BY_ONE[name](window)
        for value in x:
            found = update(value)
        title = f"After {n:,} updates with spikes, window {window}"
        yield Row(title, name, {"error": abs(found - exact) / exact})


# -- a series at once ------------------------------------------------------------------------------


def by_window(window: int) -> dict[str, Series]:
    """Return functions that compute the rolling mean over a window, by name."""
    return {
        "fastema update_many": lambda x: SimpleMovingAverage(window).update_many(x),
        "bottleneck.move_mean": lambda x: bottleneck.move_mean(x, window, 1),
        "pandas rolling.mean": lambda x: (
            pd.Series(x).rolling(window, min_periods=1).mean().to_numpy()
        ),
        "polars rolling_mean": lambda x: (
            pl.Series(x).rolling_mean(window, min_samples=1).to_numpy()
        ),
        "np.cumsum": lambda x: _by_cumsum(x, window),
    }


def _by_cumsum(x: Floats, window: int) -> Floats:
    total = np.cumsum(x)
    total[window:] -= total[:-window].copy()
    total[window:] /= window
    total[:window] /= np.arange(1, min(window, len(x)) + 1)
    return total


def by_decay(decay: float) -> dict[str, Series]:
    """Return functions that compute the EMA starting at the first value, by name."""
    alpha = 1 - decay
    return {
        "fastema update_many": lambda x: ExponentialMovingAverage(decay).update_many(x),
        "scipy lfilter": lambda x: lfilter([alpha], [1, -decay], x, zi=[decay * x[0]])[0],
        "pandas ewm.mean": lambda x: pd.Series(x).ewm(alpha=alpha, adjust=False).mean().to_numpy(),
        "polars ewm_mean": lambda x: pl.Series(x).ewm_mean(alpha=alpha, adjust=False).to_numpy(),
    }


def exact_windows(x: Floats, window: int, places: NDArray[np.int64]) -> Floats:
    """Return the means of the windows that end at `places`, rounded once or twice."""
    ends = (places + 1).tolist()
    return np.array([math.fsum(x[max(0, end - window) : end]) / min(end, window) for end in ends])


def exact_ewm_mean(x: Floats, decay: float) -> NDArray[np.longdouble]:
    """Return the EMA in extended precision, with 11 more bits on machines that have it."""
    wide, d = x.astype(np.longdouble), np.longdouble(decay)
    found, _ = lfilter([1 - d], [np.longdouble(1), -d], wide, zi=[d * wide[0]])
    return found


def _places(n: int, window: int) -> NDArray[np.int64]:
    """Return the positions to compare, fewer for large windows, which take long to sum."""
    rng = np.random.default_rng(1)
    return np.sort(rng.integers(0, n, max(200, min(20_000, 20 * n // window))))


def _error(found: Floats, exact: Any) -> float:
    return float(np.max(np.abs(found - exact) / np.abs(exact)))


def _works(
    n: int,
) -> Iterator[tuple[str, dict[str, Series], Any, Callable[[Floats], Floats]]]:
    """Yield a title, its entries, the positions to compare, and a function for exact values."""
    for window in WINDOWS:
        places = _places(n, window)
        exact = partial(exact_windows, window=window, places=places)
        yield f"A series, window {window:,}", by_window(window), places, exact
    for decay in DECAYS:
        exact = partial(exact_ewm_mean, decay=decay)
        yield f"A series, decay {decay}", by_decay(decay), slice(None), exact


def race_series(rounds: int, n: int) -> Iterator[Row]:
    """Race the entries of each series, and yield their rows with errors against exact averages."""
    kinds = {"error": losses(n, wild=False), "error_with_spikes": losses(n, wild=True)}
    for title, entries, places, exact in _works(n):
        errors: dict[str, dict[str, float]] = {name: {} for name in entries}
        for kind, x in kinds.items():
            expected = exact(x)
            for name, run in entries.items():
                errors[name][kind] = _error(run(x)[places], expected)
        x = kinds["error"]
        jobs: Mapping[str, Callable[[], object]] = {
            **{name: partial(run, x) for name, run in entries.items()},
            "limit: x.copy()": x.copy,
        }
        for row in contest(title, jobs, rounds=rounds, values=n):
            yield replace(row, figures={**row.figures, **errors.get(row.entry, {})})


def rows(settings: Settings) -> Rows:
    """Yield the rows of single updates, then of series."""
    rounds, budget_s = (3, 3.0) if settings.quick else (15, 60.0)
    yield from time_single_updates(rounds, budget_s)
    yield from drift(200_000 if settings.quick else 10_000_000)
    yield from race_series(rounds, 500_000 if settings.quick else 10_000_000)


METHOD = """\
Medians of interleaved rounds. One by one: microseconds per update of a full window. A series at
once: milliseconds for float64 values, 16 bytes moved per value; `x.copy()` moves as many. Errors
are the largest relative ones, against sums by `math.fsum` at random places and recursions in
extended precision; float64 itself ends at 1.1e-16. *With spikes*: one value in 10,000 is 1e3 to 1e9
times as large."""

QUESTION = Question(
    "Moving averages of numbers",
    METHOD,
    rows,
    packages=("numpy", "numba", "bottleneck", "pandas", "polars", "scipy"),
    figures={
        "values": Figure("values", "{:,}".format, caption=True),
        "error": Figure("error", "{:.1e}".format),
        "error_with_spikes": Figure("with spikes", "{:.1e}".format),
    },
)
