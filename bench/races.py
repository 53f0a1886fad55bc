"""Races: all jobs of a case timed in turn, once, and what one row says about it."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.cases import Case
from bench.clock import interleave, spread
from bench.jobs import LIMITS, limits, names, prepare, refusals
from bench.memory import measure_all
from bench.models import scalars, total_elements
from bench.peers import OURS

_HOST_ROUNDS = 11


@dataclass(frozen=True)
class Outcome:
    """What was measured of one case; every field is keyed by the name of the row."""

    durations: dict[str, list[float]]  # seconds, one per round
    host: dict[str, list[float]]  # the same with tensors of one element each
    peaks: dict[str, int | None]  # bytes

    def row(self, case: Case, name: str) -> dict[str, object]:
        """Return one row of the report: plain numbers, None where there is none."""
        inventory = case.inventory()
        elements = total_elements(inventory)
        nbytes = elements * case.bytes_per_element
        durations = self.durations[name]
        p20, p80 = spread(durations)
        typical = median(durations)
        best = min(median(self.durations[limit]) for limit in LIMITS)
        ours = median(self.durations[OURS])
        host = self.host.get(name)
        return {
            "case": case.name,
            "question": case.question,
            "mix": case.mix,
            "peer": name,
            "n_tensors": len(inventory),
            "n_elements": elements,
            "bytes_per_element": case.bytes_per_element,
            "rounds": len(durations),
            "median_ms": typical * 1e3,
            "p20_ms": p20 * 1e3,
            "p80_ms": p80 * 1e3,
            "gbps": nbytes / typical / 1e9,
            "share_of_limit": best / typical,
            "ratio_to_fastema": typical / ours,
            "peak_extra_bytes": self.peaks.get(name),
            "host_us": None if host is None else median(host) * 1e6,
        }


def race(case: Case, peaks: dict[str, int | None]) -> Outcome:
    """Set up all jobs of a case, check them and time them in turn.

    Raises
    ------
    AssertionError
        A result is wrong; the text names case and peer.
    """
    jobs = prepare(case) | limits(case)
    durations = interleave(jobs, case.rounds, hot=case.hot, budget_s=case.budget_s)
    jobs.clear()
    gc.collect()
    count = len(case.inventory())
    bare = Case(f"scalars-{count}", case.mix, lambda: scalars(count), 0, case.question)
    host = interleave(prepare(bare), _HOST_ROUNDS, budget_s=case.budget_s, settle_s=0.0)
    return Outcome(durations, host, peaks)


def run(cases: Sequence[Case], quick: bool) -> tuple[list[dict[str, object]], list[str]]:
    """Race all cases, one after the other.

    Parameters
    ----------
    cases
        Of one mode.
    quick
        Whether it is the quick one.

    Returns
    -------
    rows : list of dict
        One for each case and entry that takes part.
    failed : list of str
        Names of cases that raised; the traceback was printed, and the others went on.
    """
    # Before anything large is held in this process.
    peaks = measure_all([case for case in cases if case.memory], quick)
    rows, failed = [], []
    for case in cases:
        try:
            outcome = race(case, peaks.get(case.name, {}))
        except Exception:
            traceback.print_exc()
            failed.append(case.name)
            continue
        out = refusals(case)
        rows += [outcome.row(case, name) for name in names(case) if name not in out]
        print(f"{case.name}: {len(outcome.durations[OURS])} rounds", flush=True)
    return rows, failed
