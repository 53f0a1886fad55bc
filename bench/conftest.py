"""pytest-benchmark as the runner: ``pytest bench/bench_update.py bench/bench_swap.py``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

# bench/ is run from a checkout and never installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.cases import Case, select
from bench.clock import Replay
from bench.jobs import names, refusals
from bench.races import Races

REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastema benchmarks")
    group.addoption("--quick", action="store_true", help="smaller shapes and fewer rounds")
    group.addoption(
        "--case", action="append", default=[], metavar="NAME", help="only cases of this name"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Hints such as "nothing to save" or "another machine": as errors they would hide the cause.
    config.addinivalue_line(
        "filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test per case and row; the rows of a case are one group of the report."""
    cases = select(metafunc.config.getoption("--quick"), metafunc.config.getoption("--case"))
    metafunc.parametrize(
        ("case", "peer"),
        [
            pytest.param(
                case,
                name,
                id=f"{case.name}-{name}",
                marks=pytest.mark.benchmark(group=case.name, timer=REPLAY.read),
            )
            for case in cases
            if case.question == metafunc.module.QUESTION
            for name in names(case)
        ],
    )


@pytest.fixture(scope="session")
def races(request: pytest.FixtureRequest) -> Races:
    specs = [item.callspec for item in request.session.items if isinstance(item, pytest.Function)]
    cases = dict.fromkeys(spec.params["case"] for spec in specs)
    # A file without a single case has one test whose parameters are not set.
    return Races([c for c in cases if isinstance(c, Case)], request.config.getoption("--quick"))


@pytest.fixture
def replay(races: Races, benchmark: BenchmarkFixture) -> Callable[[Case, str], None]:
    """Return a function that reports one row of a case to pytest-benchmark."""

    def report(case: Case, peer: str) -> None:
        if reason := refusals(case).get(peer):
            pytest.skip(reason)
        outcome = races.outcome(case)
        durations = outcome.durations[peer]
        benchmark.extra_info.update(outcome.row(case, peer))
        REPLAY.load(durations)
        benchmark.pedantic(lambda: None, rounds=len(durations), iterations=1, warmup_rounds=0)

    return report
