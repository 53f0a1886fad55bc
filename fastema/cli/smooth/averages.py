"""Compute moving averages of a log's metrics; write them as columns, draw them as lines."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from fastema.checkpoint.files import atomic_write_path
from fastema.errors import ArgumentError, NonFiniteError
from fastema.tracking.logs.table import Table
from fastema.tracking.plots.panels import AveragedLine, make_series_panel


class Smoothed(NamedTuple):
    """One average of one metric."""

    metric: str
    average: AveragedLine
    column: str  # the column's name in the output
    series: NDArray[np.float64]  # (n,), one per value of the metric


def smooth(
    log: Table,
    averages: Sequence[AveragedLine],
    *,
    metrics: Sequence[str] | None = None,
    weights: str | None = None,
) -> list[Smoothed]:
    """Return every average of every metric of a log.

    `metrics` selects metrics by name or pattern; None takes all. `weights` names the column with
    the weight of each row.

    Raises
    ------
    ArgumentError
        For a missing weight, a column name that is taken, or no metric at all.
    NonFiniteError
        For a NaN or an infinity, if the average is to raise on one.
    """
    by_row = np.full(log.num_rows, np.nan)
    if weights is not None:
        rows, values = log.column(weights)
        by_row[rows] = values
    names = [name for name in log.metrics(metrics) if name != weights]
    taken = set(log.cells)
    smoothed = []
    for name in names:
        rows, values = log.column(name)
        weight = None
        if weights is not None:
            weight = by_row[rows]
            if not np.isfinite(weight).all():
                row = int(rows[~np.isfinite(weight)][0])
                raise ArgumentError(
                    f"{log.source}: row {row + 1} has a value of {name}, but no weight in {weights}"
                )
        for average in averages:
            column = _column(name, average, averages, taken)
            if column in taken:
                raise ArgumentError(
                    f"{log.source} has a column {column!r} already; smooth the original log, "
                    "or other metrics"
                )
            taken.add(column)
            try:
                series = average.make().update_many(values, weight)
            except NonFiniteError as error:
                raise NonFiniteError(f"{log.source}, {name}: {error}") from None
            smoothed.append(Smoothed(name, average, column, series))
    if not smoothed:
        raise ArgumentError(f"{log.source}: no metric besides the weights in {weights}")
    return smoothed


def _column(
    name: str, average: AveragedLine, averages: Sequence[AveragedLine], taken: set[str]
) -> str:
    """Return ``loss_ema``, or ``loss_ema_0.9`` if there are several or the short name is taken."""
    short = f"{name}_{average.kind}"
    alone = sum(other.kind == average.kind for other in averages) == 1
    return short if alone and short not in taken else f"{short}_{average.setting}"


def write(file: TextIO, log: Table, smoothed: Sequence[Smoothed], *, raw: bool) -> None:
    """Write the log's columns unchanged, followed by the averages in full precision."""
    averaged = {one.metric for one in smoothed}
    columns = {name: cells for name, cells in log.cells.items() if raw or name not in averaged}
    for one in smoothed:
        cells = [""] * log.num_rows
        rows, _ = log.column(one.metric)
        for row, value in zip(rows.tolist(), one.series.tolist(), strict=True):
            cells[row] = repr(value)
        columns[one.column] = cells
    writer = csv.writer(file, delimiter=log.delimiter, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))


def save(out: Path, log: Table, smoothed: Sequence[Smoothed], *, raw: bool) -> None:
    """Write log and averages to a file atomically: an old file stays until the new is complete."""
    with (
        _replaceable(out) as partial,
        open(partial, "w", encoding="utf-8", newline="") as file,
    ):
        write(file, log, smoothed, raw=raw)


def _replaceable(out: Path) -> AbstractContextManager[str]:
    """Return a context manager for the name to write to: `out` itself if it is a device or pipe."""
    if out.exists() and not out.is_file():
        return nullcontext(str(out))
    return atomic_write_path(out.resolve(), out.suffix)


def draw(
    out: Path,
    log: Table,
    smoothed: Sequence[Smoothed],
    step: str | None,
    raw: bool,
    asked_for: bool,
    scale: Any,
) -> None:
    """Draw metrics and averages; if `asked_for`, also the averages of short curves."""
    from fastema.tracking.plots import picture

    curves = log.curves(step)
    panels = []
    for name, group in itertools.groupby(smoothed, key=lambda one: one.metric):
        drawn = np.ones(len(log.column(name).rows), bool)
        if step is not None:  # a row without a step is not drawn
            drawn = np.isin(log.column(name).rows, log.column(step).rows)
        series = [(one.average, one.series[drawn]) for one in group]
        panels.append(make_series_panel(name, step or "row", curves[name], series, raw, asked_for))
    with _replaceable(out) as partial:
        picture.draw(panels, log=scale, title=Path(log.source).name, out=partial)
