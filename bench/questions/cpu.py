"""Race updates and swaps of PyTorch models on the CPU against peers and the memory bandwidth."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median

from bench.race.cases import FULL, QUICK, Case
from bench.race.contest import contest
from bench.race.jobs import prepare, refusals
from bench.race.memory import measure_peaks_in_subprocess
from bench.race.question import Question, Settings
from bench.race.report import Figure, Row, Rows, number
from bench.race.shapes import scalars, total_elements
from fastema.cli.clock import interleave

_HOST_ROUNDS = 11


def race(case: Case, peak_bytes: Mapping[str, int | None]) -> list[Row]:
    """Set up all jobs of a case, verify them, time them in turn, and return their rows.

    Raises
    ------
    AssertionError
        If a result is wrong; the message names case and peer.
    """
    inventory = case.inventory()
    rows = contest(
        case.title,
        prepare(case),
        rounds=case.rounds,
        hot=case.hot,
        budget_s=case.budget_s,
        n_tensors=len(inventory),
        n_elements=total_elements(inventory),
        bytes_per_element=case.bytes_per_element,
        passes=2 if case.question == "swap" else 1,
    )
    gc.collect()
    count = len(inventory)
    bare = Case(f"scalars-{count}", case.mix, lambda: scalars(count), 0, case.question)
    host = interleave(prepare(bare), _HOST_ROUNDS, budget_s=case.budget_s, settle_s=0.0)
    return [_with_memory_and_host(row, peak_bytes, host) for row in rows]


def _with_memory_and_host(
    row: Row, peak_bytes: Mapping[str, int | None], host: Mapping[str, Sequence[float]]
) -> Row:
    peak, times = peak_bytes.get(row.entry), host.get(row.entry)
    more = {
        "peak_extra_mb": None if peak is None else peak / 1e6,
        "host_us": None if times is None else median(times) * 1e6,
    }
    return replace(row, figures={**row.figures, **more})


def cases(settings: Settings) -> list[str]:
    """Return the names of all cases, in full or in quick mode."""
    return [case.name for case in (QUICK if settings.quick else FULL)]


def rows(settings: Settings) -> Rows:
    """Race the chosen cases one after another; continue with the next if one raises."""
    chosen = [case for case in (QUICK if settings.quick else FULL) if settings.wants(case.name)]
    # Measure memory before this process allocates anything large.
    peak_bytes = measure_peaks_in_subprocess(
        [case for case in chosen if case.memory], settings.quick
    )
    for case in chosen:
        try:
            yield from race(case, peak_bytes.get(case.name, {}))
        except Exception as error:
            traceback.print_exc()
            yield Row(case.title, "all", missing=f"{type(error).__name__}: {error}", failed=True)
            continue
        yield from _refused(case)
        print(case.name, file=sys.stderr, flush=True)


def _refused(case: Case) -> Iterator[Row]:
    for peer, reason in refusals(case).items():
        yield Row(case.title, peer, missing=reason)


METHOD = """\
All entries of a case run in turn, A B C A B C ..., in one process on all cores; medians of the
rounds. Each result was found equal to a float64 reference first. GB/s counts the least bytes that
the work needs, whatever an entry really moves; *the limit* is the time of the better of two plain
kernels that move as many. Peak extra memory is the rise of resident memory during one call, taken
in a process of its own; below 0.1 MB it is the measurement's own. *host* is the time of the same
call with as many tensors of one element. *hot* cases call each entry once more right before the
timed call, so that what fits lies in the caches; in the others the rest of the field ran in
between."""

QUESTION = Question(
    "Updates and swaps on the CPU",
    METHOD,
    rows,
    cases,
    figures={"ratio": Figure("time / fastema", number)},
)
