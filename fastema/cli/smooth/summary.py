"""The summary that ``fastema smooth`` prints at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastema.cli.arguments import STANDARD
from fastema.cli.smooth.averages import Smoothed
from fastema.tracking.logs.table import Table

MOST_METRICS = 30


def summary(
    log: Table,
    smoothed: Sequence[Smoothed],
    step: str | None,
    out: Path | None,
    picture: Path | None,
) -> str:
    """Return a table of the last value of each metric and average, and the files written."""
    names = list(dict.fromkeys(one.metric for one in smoothed))
    rows = [["", "values", "last", *dict.fromkeys(one.average.label for one in smoothed)]]
    for name in names[:MOST_METRICS]:
        values = log.column(name).values
        last = [one.series[-1] for one in smoothed if one.metric == name]
        rows.append([name, f"{len(values):,}", *(f"{value:.5g}" for value in (values[-1], *last))])
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_where(log, step)]
    for first, *others in rows:
        cells = [first.ljust(wide[0]), *map(str.rjust, others, wide[1:])]
        lines.append("  ".join(cells).rstrip())
    if len(names) > MOST_METRICS:
        lines.append(f"and {len(names) - MOST_METRICS} more")
    words = [name for name in log.cells if name not in log.numbers]
    if words:
        lines.append(f"Left out, because not all values are numbers: {', '.join(words)}")
    if out not in (None, STANDARD):
        lines.append(f"Averages: {out}")
    if picture:
        lines.append(f"Picture: {picture}")
    return "\n".join(lines)


def _where(log: Table, step: str | None) -> str:
    rows = f"{log.source}: {log.num_rows:,} {'row' if log.num_rows == 1 else 'rows'}"
    if step is None:
        return f"{rows}; no column counts the steps of all metrics, so steps are row numbers"
    steps = log.column(step).values
    return f"{rows}, {step} {steps[0]:.12g} to {steps[-1]:.12g}"
