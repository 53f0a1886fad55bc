"""A contest: entries that do the same work, timed in turn next to the memory bandwidth limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from bench.race.durations import summarize_times
from bench.race.report import Row
from fastema.cli.clock import interleave

Job = Callable[[], object]

LIMITS = ("limit: read-read-write", "limit: streaming copy")
"""Plain kernels that move the same number of bytes; the faster one is this machine's limit."""


def make_limit_jobs(nbytes: int, passes: int = 1) -> dict[str, Job]:
    """Return calls, by name in `LIMITS`, that move `nbytes` in `passes` passes over one memory."""
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
    """Time the entries in turn and return one row for each entry and each limit.

    Parameters
    ----------
    table
        Title of the table.
    jobs
        Name -> call. Ratios are relative to the first entry's time.
    n_elements, bytes_per_element
        Size of the work and the least traffic per element, as a number or by entry. The limits
        move as many bytes as the first entry must. Without both there are no limits.
    passes
        Number of passes in which the limits move their bytes, over the same memory.
    rounds, hot, budget_s
        See `fastema.cli.clock.interleave`.
    facts
        Further figures, stored with every row.
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
        everything |= make_limit_jobs(int(n_elements * per_entry[first]), passes)
    durations = interleave(everything, rounds, hot=hot, budget_s=budget_s)
    typical = {name: median(times) for name, times in durations.items()}
    rows = []
    for name, times in durations.items():
        figures = {**facts, **summarize_times(times)}
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
