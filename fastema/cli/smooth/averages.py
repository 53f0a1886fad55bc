"""The moving averages of a log's metrics, as columns of a file and lines of a picture."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from fastema.checkpoint.files import moved_into_place
from fastema.errors import ArgumentError, NonFiniteError
from fastema.tracking.logs.table import Table
from fastema.tracking.plots.panels import AveragedLine, of_series


class Smoothed(NamedTuple):
    """One average of one metric."""

    metric: str
    average: AveragedLine
    column: str  # its name in the output
    series: NDArray[np.float64]  # (n,), one for each of the metric's values


def smooth(
    log: Table,
    averages: Sequence[AveragedLine],
    *,
    metrics: Sequence[str] | None = None,
    weights: str | None = None,
) -> list[Smoothed]:
    """Each of the averages of each metric of a log, chosen by names or patterns.

    `weights` is the column with the weight of each row.
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
                    f"{log.source} has a column {column!r} already; smooth the log that it came "
                    "from, or other metrics of it"
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
    """``loss_ema``; ``loss_ema_0.9`` where it is one of several, or the other is taken."""
    short = f"{name}_{average.kind}"
    alone = sum(other.kind == average.kind for other in averages) == 1
    return short if alone and short not in taken else f"{short}_{average.setting}"


def write(file: TextIO, log: Table, smoothed: Sequence[Smoothed], *, raw: bool) -> None:
    """Write the log's columns as they were, and the averages in full precision after them."""
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
    """Write them to a file, atomically: the old file stays until the new one is complete."""
    with (
        _replaceable(out) as partial,
        open(partial, "w", encoding="utf-8", newline="") as file,
    ):
        write(file, log, smoothed, raw=raw)


def _replaceable(out: Path) -> AbstractContextManager[str]:
    """The name to write to; only what is a file is replaced by another, a device is not."""
    if out.exists() and not out.is_file():
        return nullcontext(str(out))
    return moved_into_place(out.resolve(), out.suffix)


def draw(
    out: Path,
    log: Table,
    smoothed: Sequence[Smoothed],
    step: str | None,
    raw: bool,
    asked_for: bool,
    scale: Any,
) -> None:
    """Draw the metrics and their averages; those of short curves too where they were asked for."""
    from fastema.tracking.plots import picture

    curves = log.curves(step)
    panels = []
    for name, group in itertools.groupby(smoothed, key=lambda one: one.metric):
        drawn = np.ones(len(log.column(name).rows), bool)
        if step is not None:  # a row without a step is not drawn
            drawn = np.isin(log.column(name).rows, log.column(step).rows)
        series = [(one.average, one.series[drawn]) for one in group]
        panels.append(of_series(name, step or "row", curves[name], series, raw, asked_for))
    with _replaceable(out) as partial:
        picture.draw(panels, log=scale, title=Path(log.source).name, out=partial)
