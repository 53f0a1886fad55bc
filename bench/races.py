"""Races: all jobs of a case timed in turn, once, and what one row says about it."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from statistics import median

from bench.cases import Case
from bench.clock import interleave, spread
from bench.jobs import LIMITS, limits, prepare
from bench.memory import measure_all
from bench.peers import OURS
from fastema.testing.models import scalars, total_elements

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


class Races:
    """Runs each case once, when its first row is asked for.

    Parameters
    ----------
    cases
        All cases that may be asked for.
    quick
        Whether they are those of the quick mode.
    """

    def __init__(self, cases: list[Case], quick: bool) -> None:
        self._cases = cases
        self._quick = quick
        self._outcomes: dict[str, Outcome | Exception] = {}
        self._peaks: dict[str, dict[str, int | None]] | None = None

    def outcome(self, case: Case) -> Outcome:
        """Return what was measured of `case`, measuring it now if that has not been done."""
        if self._peaks is None:  # before anything large is held in this process
            self._peaks = measure_all([c for c in self._cases if c.memory], self._quick)
        if case.name not in self._outcomes:
            try:
                self._outcomes[case.name] = self._run(case, self._peaks.get(case.name, {}))
            except Exception as error:  # each of the case's rows fails by it, without a new race
                self._outcomes[case.name] = error
        outcome = self._outcomes[case.name]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    @staticmethod
    def _run(case: Case, peaks: dict[str, int | None]) -> Outcome:
        jobs = prepare(case) | limits(case)
        durations = interleave(jobs, case.rounds, hot=case.hot, budget_s=case.budget_s)
        jobs.clear()
        gc.collect()
        count = len(case.inventory())
        bare = Case(f"scalars-{count}", case.mix, lambda: scalars(count), 0, case.question)
        host = interleave(prepare(bare), _HOST_ROUNDS, budget_s=case.budget_s, settle_s=0.0)
        return Outcome(durations, host, peaks)
