"""A contest: entries that do the same work, timed in turn beside the memory's limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from bench.race.clock import interleave, timing
from bench.race.report import Row

Job = Callable[[], object]

LIMITS = ("limit: read-read-write", "limit: streaming copy")
"""What this machine's memory allows for the same number of bytes: the better of the two."""


def limits(nbytes: int, passes: int = 1) -> dict[str, Job]:
    """Return calls that move `nbytes` in so many passes over the same memory."""
    from fastema.engine.limit import ReadReadWrite, StreamCopy

    def repeated(once: Job) -> Job:
        def job() -> None:
            for _ in range(passes):
                once()

        return job

    kernels = (ReadReadWrite(nbytes // passes), StreamCopy(nbytes // passes))
    return {name: repeated(kernel) for name, kernel in zip(LIMITS, kernels, strict=True)}


def contest(
    table: str,
    jobs: Mapping[str, Job],
    *,
    rounds: int,
    n_elements: int | None = None,
    bytes_per_element: float | Mapping[str, float] | None = None,
    passes: int = 1,
    hot: bool = False,
    budget_s: float = float("inf"),
    **facts: Any,
) -> list[Row]:
    """Time the entries in turn and return their rows, those of the limits among them.

    Parameters
    ----------
    table
        Title of their table.
    jobs
        Name -> call; the times of all are set against the first one's.
    n_elements, bytes_per_element
        Of the work: what at least has to be moved, for each entry where they differ. The limits
        move what the first has to. Without them there is no limit.
    passes
        Over the same memory.
    rounds, hot, budget_s
        See `bench.race.clock.interleave`.
    facts
        More figures of all rows.
    """
    first = next(iter(jobs))
    moved: dict[str, float] = {}
    everything = dict(jobs)
    if n_elements is not None:
        facts["n_elements"] = n_elements
    if n_elements is not None and bytes_per_element is not None:
        each = bytes_per_element
        per_entry = dict(each) if isinstance(each, Mapping) else dict.fromkeys(jobs, each)
        moved = dict.fromkeys(LIMITS, per_entry[first]) | per_entry
        everything |= limits(int(n_elements * per_entry[first]), passes)
    durations = interleave(everything, rounds, hot=hot, budget_s=budget_s)
    typical = {name: median(times) for name, times in durations.items()}
    rows = []
    for name, times in durations.items():
        figures = {**facts, **timing(times)}
        if moved:
            limit_s = min(typical[limit] for limit in LIMITS) * moved[name] / moved[LIMITS[0]]
            nbytes = n_elements * moved[name]
            figures |= {
                "bytes_per_element": moved[name],
                "gbps": nbytes / typical[name] / 1e9,
                "share_of_limit": limit_s / typical[name],
            }
        figures["ratio"] = typical[name] / typical[first]
        rows.append(Row(table, name, figures))
    return rows
