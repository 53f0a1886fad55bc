"""Time updates right after optimizer steps: ``pytest bench/loop [--quick] [--case NAME]``."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from pytest_benchmark.fixture import BenchmarkFixture

from bench.loop.cases import Case
from bench.loop.race import Timings
from bench.loop.replay import Replay


def test_update(
    case: Case,
    contestant: str,
    races: Callable[[Case], dict[str, Timings]],
    replay: Replay,
    benchmark: BenchmarkFixture,
) -> None:
    """Report a contestant's durations in the race of its case; see `Replay` for the reason."""
    timings = races(case)[contestant]
    replay.load(timings.loop)
    benchmark.extra_info.update(
        table=case.title,
        size=case.size,
        n_elements=case.n_elements,
        n_tensors=case.n_tensors,
        contestant=contestant,
        hot_us=median(timings.hot) * 1e6,
    )
    benchmark.pedantic(lambda: None, rounds=len(timings.loop), iterations=1)
