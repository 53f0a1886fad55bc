"""A training log as a table: the cells as they were written, and the numbers in them as curves.

A blank cell (also ``NA``, ``None``, ``null``) says that nothing was measured in that row, and the
curve has no point there; ``nan`` is a measurement that came out so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.errors import ArgumentError, listed

STEP_COLUMNS: Final = (
    "step",
    "global_step",
    "_step",
    "steps",
    "batch",
    "iteration",
    "iter",
    "epoch",
    "index",
)
"""Names of columns that count, the most telling first."""

_TIMES: Final = ("time", "wall_time", "timestamp", "_timestamp", "_runtime", "elapsed", "created")
_RATE: Final = re.compile(r"(.*_)?(lr|learning_rate)([-_].*)?")
_BLANKS: Final = frozenset(("", "na", "n/a", "<na>", "none", "null"))
_AVERAGED: Final = re.compile(r"(?P<base>.+)_(?:sma|ema)(?:_[0-9.]+)?")


class Curve(NamedTuple):
    """What was measured when, in the order in which it was recorded."""

    steps: NDArray[np.int64] | NDArray[np.float64]  # (n,)
    values: NDArray[np.float64]  # (n,)


class Column(NamedTuple):
    """The numbers in a column and the rows they stand in, counted from 0."""

    rows: NDArray[np.int64]  # (n,)
    values: NDArray[np.float64]  # (n,)


@dataclass(frozen=True)
class Table:
    """A log: one list of cells per column, all of the same length, and the curves in them.

    Attributes
    ----------
    source : str
        Where it was read from.
    cells : dict of str to list of str
        The columns as they were written, ``""`` for a cell that is not there.
    numbers : dict of str to Column
        The columns in which nothing but numbers and blanks stand, and at least one number.
    delimiter : str
        Between the cells of a row.
    counted_by : str, optional
        The column that counts the steps, where that is known.
    """

    source: str
    cells: dict[str, list[str]]
    numbers: dict[str, Column]
    delimiter: str = ","
    counted_by: str | None = None

    @property
    def num_rows(self) -> int:
        """The number of rows, without the names of the columns."""
        return max(map(len, self.cells.values()), default=0)

    def step_column(self, name: str | None = None) -> str | None:
        """The column that counts the steps; None where the row's number has to do.

        It is the first of `STEP_COLUMNS` that has a number wherever a metric has one and that
        rises from each point of a metric to the next. A batch number that begins anew in every
        epoch does not, nor does an epoch's in a log of batches.

        Parameters
        ----------
        name : str, optional
            The column to take instead.

        Raises
        ------
        ArgumentError
            If the column named is not there, or has no number where a metric has one.
        """
        if name is None:
            return self.counted_by or step_column(self.numbers)
        self.column(name)
        if not _has_all_rows(self.numbers, name):
            raise ArgumentError(
                f"{self.source}: column {name!r} cannot count the steps, some of its cells are "
                "blank or not finite"
            )
        return name

    def curves(self, step: str | None = None) -> dict[str, Curve]:
        """All columns of numbers as curves over the steps.

        Parameters
        ----------
        step : str, optional
            As `step_column` says it; the row's number, from 0, by default.
        """
        return curves(self.numbers, step)

    def column(self, name: str) -> Column:
        """A column of numbers.

        Raises
        ------
        ArgumentError
            If there is none of that name; the message lists those there are.
        """
        if name in self.numbers:
            return self.numbers[name]
        if name in self.cells:
            row, cell = _first_text(self.cells[name])
            why = f"row {row + 1} has {cell!r}" if cell else "all of its cells are blank"
            raise ArgumentError(f"{self.source}: column {name!r} holds no numbers: {why}")
        raise ArgumentError(
            f"{self.source}: no column {name!r}; those with numbers are\n{listed(self.numbers)}"
        )

    def metrics(self, patterns: Sequence[str] | None = None) -> list[str]:
        """Names of the columns that hold metrics.

        Parameters
        ----------
        patterns : sequence of str, optional
            Names, or patterns such as ``val_*``. By default every column of at least two
            numbers, but for those that count steps, tell times or learning rates, or hold
            averages of another column already.

        Raises
        ------
        ArgumentError
            If a name is not there, a pattern fits none, or there is nothing but such columns.
        """
        if patterns is None:
            found = metrics(self.numbers)
            if not found:
                raise ArgumentError(
                    f"{self.source}: no column of at least two numbers that looks like a metric; "
                    f"name what you want of\n{listed(self.numbers or self.cells)}"
                )
            return found
        chosen: dict[str, None] = {}
        for pattern in patterns:
            fits = [name for name in self.numbers if fnmatchcase(name, pattern)]
            if pattern in self.cells or not fits:
                self.column(pattern)
                fits = [pattern]
            chosen.update(dict.fromkeys(fits))
        return list(chosen)


def step_column(columns: Mapping[str, Column]) -> str | None:
    """The first of `STEP_COLUMNS` that rises with every metric, if any does."""
    by_name = {_short(name): name for name in reversed(list(columns))}
    counting = (by_name[name] for name in STEP_COLUMNS if name in by_name)
    return next((name for name in counting if _rises(columns, name)), None)


def curves(columns: Mapping[str, Column], step: str | None) -> dict[str, Curve]:
    """Columns as curves over the numbers of one of them, or over the rows."""
    if step is None:
        return {name: Curve(rows, values) for name, (rows, values) in columns.items()}
    at = columns[step]
    return {
        # At a row without a step there is no point to draw.
        name: Curve(_whole(_at_rows(at, rows)[known]), values[known])
        for name, (rows, values) in columns.items()
        for known in [np.isin(rows, at.rows)]
    }


def metrics(columns: Mapping[str, Column] | Mapping[str, Curve]) -> list[str]:
    """Names of what is worth averaging."""
    return [
        name
        for name, column in columns.items()
        if len(column.values) > 1 and not _is_no_metric(name) and not averaged(name, columns)
    ]


def averaged(name: str, names: Iterable[str]) -> str:
    """The name of what this column holds the average of, if that is among `names`."""
    found = _AVERAGED.fullmatch(name)
    base = found["base"] if found else ""
    return base if base in names or f"{base}_raw" in names else ""


def _is_no_metric(name: str) -> bool:
    short = _short(name)
    return short in (*STEP_COLUMNS, *_TIMES) or bool(_RATE.fullmatch(short))


def _short(name: str) -> str:
    return name.strip().lower().split("/")[-1]


def _at_rows(column: Column, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The column's numbers in these rows; any, where it has none."""
    places = np.minimum(np.searchsorted(column.rows, rows), len(column.rows) - 1)
    numbers: NDArray[np.float64] = column.values[places]
    return numbers


def _has_all_rows(columns: Mapping[str, Column], step: str) -> bool:
    at = columns[step]
    return bool(np.isfinite(at.values).all()) and all(
        bool(np.isin(rows, at.rows).all())
        for name, (rows, _) in columns.items()
        if not _is_no_metric(name)
    )


def _rises(columns: Mapping[str, Column], step: str) -> bool:
    return _has_all_rows(columns, step) and all(
        bool((np.diff(_at_rows(columns[step], rows)) > 0).all())
        for name, (rows, _) in columns.items()
        if not _is_no_metric(name)
    )


def _whole(steps: NDArray[np.float64]) -> NDArray[np.int64] | NDArray[np.float64]:
    if (np.abs(steps) < 2**53).all() and (steps == np.floor(steps)).all():
        return steps.astype(np.int64)
    return steps


def _is_blank(cell: str) -> bool:
    return cell.strip().lower() in _BLANKS


def parsed(cells: Sequence[str]) -> Column | None:
    """The numbers of a column, unless something else stands in it or it is all blank."""
    try:
        rows = [row for row, cell in enumerate(cells) if not _is_blank(cell)]
        values = [float(cells[row]) for row in rows]
    except ValueError:
        return None
    return Column(np.array(rows, np.int64), np.array(values, np.float64)) if rows else None


def _first_text(cells: Sequence[str]) -> tuple[int, str]:
    """Row and text of the first cell that is neither a number nor blank."""
    for row, cell in enumerate(cells):
        if parsed([cell]) is None and not _is_blank(cell):
            return row, cell
    return 0, ""


def of_cells(cells: dict[str, list[str]], source: str, delimiter: str = ",") -> Table:
    """A table of text.

    Raises
    ------
    ArgumentError
        If there is no column of numbers.
    """
    found = {name: parsed(column) for name, column in cells.items()}
    numbers = {name: column for name, column in found.items() if column is not None}
    if not numbers:
        raise ArgumentError(f"{source}: no column of numbers among {', '.join(cells) or 'none'}")
    return Table(source, cells, numbers, delimiter)
