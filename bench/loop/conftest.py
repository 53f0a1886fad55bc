"""Options and cases of ``pytest bench/loop``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from bench.loop.cases import Case, select
from bench.loop.race import Timings, contestants, race
from bench.loop.replay import Replay

REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastema benchmarks")
    group.addoption("--quick", action="store_true", help="fewer networks, dtypes and rounds")
    group.addoption(
        "--case", action="append", default=[], metavar="NAME", help="only cases with this name"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Remarks such as "nothing to save": as errors they would hide the cause.
    config.addinivalue_line(
        "filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test for each contestant of each case; a case is a group of the report."""
    names = metafunc.config.getoption("--case")
    cases = select(metafunc.config.getoption("--quick"), names)
    if not cases:
        raise pytest.UsageError(f"--case: no case is called {' or '.join(map(repr, names))}")
    metafunc.parametrize(
        ("case", "contestant"),
        [
            pytest.param(
                case,
                name,
                id=f"{case.name}:{name}",
                marks=pytest.mark.benchmark(group=case.name, timer=REPLAY.read),
            )
            for case in cases
            for name in contestants(case.mix)
        ],
    )


@pytest.fixture(scope="session")
def races() -> Callable[[Case], dict[str, Timings]]:
    """Return a function that races a case's contestants once and keeps their durations."""
    return cache(race)


@pytest.fixture(scope="session")
def replay() -> Replay:
    """Return the timer of the benchmarks."""
    return REPLAY
