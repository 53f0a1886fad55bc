"""A training log as a table: the original cells, and their numbers as curves.

A blank cell (also ``NA``, ``None``, ``null``) means that nothing was measured in that row, so the
curve has no point there. ``nan`` is a measured value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fastema.errors import ArgumentError, format_problems

STEP_COLUMNS: Final = (
    *("step", "global_step", "_step", "steps", "batch", "iteration", "iter", "epoch", "index"),
)
"""Names of columns that count steps, in order of preference."""

_TIMES: Final = ("time", "wall_time", "timestamp", "_timestamp", "_runtime", "elapsed", "created")
_RATE: Final = re.compile(r"(.*_)?(lr|learning_rate)([-_].*)?")
_SPEED: Final = re.compile(r"(.*_)?(runtime|\w+_per_second|total_flos)")
_BLANKS: Final = frozenset(("", "na", "n/a", "<na>", "none", "null"))

_DECIMAL: Final = re.compile(r"\s*[+-]?\d*,?\d+([eE][+-]?\d+)?\s*|\s*[+-]?(nan|inf)\s*", re.I)
"""A number with a decimal comma, without a decimal separator, or not finite."""

_NAME: Final = re.compile(r"(.+)_(raw|sma|ema)(?:_([0-9.]+))?")
"""The name of a column that is an average of a metric, or the raw values beside one."""


class Curve(NamedTuple):
    """Measurements and their steps, in recorded order."""

    steps: NDArray[np.int64] | NDArray[np.float64]  # (n,)
    values: NDArray[np.float64]  # (n,)


class Column(NamedTuple):
    """The numbers in a column and their rows, counted from 0."""

    rows: NDArray[np.int64]  # (n,)
    values: NDArray[np.float64]  # (n,)


class ColumnRole(NamedTuple):
    """The metric that a column belongs to, and its role there."""

    metric: str
    kind: Literal["", "raw", "sma", "ema"] = ""  # "" for the metric's own column
    setting: str = ""  # the window or the decay, if it is in the name


@dataclass(frozen=True)
class Table:
    """A log with one list of cells per column, all of the same length, and their numbers."""

    source: str  # name for error messages
    numbers: dict[str, Column]
    """The columns that contain only numbers and blanks, and at least one number."""
    cells: dict[str, list[str]] = field(default_factory=dict)
    """The original text of the columns, ``""`` for a missing cell."""
    delimiter: str = ","
    counted_by: str | None = None
    """The column that counts the steps, if known."""

    @cached_property
    def num_rows(self) -> int:
        """Number of rows, without the header."""
        return max(map(len, self.cells.values()), default=0)

    def step_column(self, name: str | None = None) -> str | None:
        """Return the name of the column that counts the steps; None to use row numbers.

        By default this is the first of `STEP_COLUMNS` that has a number wherever a metric has one,
        and rises from point to point of each metric. A batch number that restarts in every epoch
        does not rise, nor does the epoch in a log of batches. If `name` is passed, raise an
        ArgumentError unless that column exists and has a finite number wherever a metric has one.
        """
        if name is None:
            by_name = {_base_name(column): column for column in reversed(list(self.numbers))}
            counting = (by_name[short] for short in STEP_COLUMNS if short in by_name)
            return self.counted_by or next(
                (one for one in counting if self._counts_steps(one)), None
            )
        self.column(name)
        if not self._counts_steps(name, rising=False):
            raise ArgumentError(
                f"{self.source}: column {name!r} cannot count the steps: some of its cells are "
                "blank or not finite"
            )
        return name

    def _counts_steps(self, name: str, rising: bool = True) -> bool:
        """Return whether a column has a number wherever a metric has one, and rises there."""
        at, steps = self.numbers[name]
        metrics = [rows for other, (rows, _) in self.numbers.items() if not _is_auxiliary(other)]
        if not (np.isfinite(steps).all() and all(np.isin(rows, at).all() for rows in metrics)):
            return False
        return not rising or all(
            (np.diff(steps[np.searchsorted(at, rows)]) > 0).all() for rows in metrics
        )

    def curves(self, step: str | None = None) -> dict[str, Curve]:
        """Return all columns of numbers as curves over the column `step`, or row numbers from 0."""
        if step is None:
            return {name: Curve(rows, values) for name, (rows, values) in self.numbers.items()}
        at, steps = self.numbers[step]
        return {
            # A row without a step has no point.
            name: Curve(_to_integers(steps[np.searchsorted(at, rows[known])]), values[known])
            for name, (rows, values) in self.numbers.items()
            for known in [np.isin(rows, at)]
        }

    def column(self, name: str) -> Column:
        """Return a column of numbers; raise an ArgumentError that lists them if it is not one."""
        if name in self.numbers:
            return self.numbers[name]
        if name in self.cells:
            why = "all of its cells are blank"
            for row, cell in enumerate(self.cells[name], 1):
                if not _is_blank(cell) and parse_column([cell]) is None:
                    why = f"row {row} has {cell!r}"
                    break
            raise ArgumentError(f"{self.source}: column {name!r} holds no numbers: {why}")
        raise ArgumentError(
            f"{self.source}: no column {name!r}; those with numbers are\n"
            f"{format_problems(self.numbers)}"
        )

    def metrics(self, patterns: Sequence[str] | None = None) -> list[str]:
        """Return the columns that contain metrics, or match names or patterns such as ``val_*``.

        Steps, times, learning rates and averages of other columns are not metrics. Raise an
        ArgumentError if there is no metric, or a name or pattern matches no column of numbers.
        """
        if patterns is None:
            found = metrics(self.numbers)
            if not found:
                raise ArgumentError(
                    f"{self.source}: no column of at least two numbers that looks like a metric; "
                    f"choose among\n{format_problems(self.numbers or self.cells)}"
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


def metrics(columns: Mapping[str, Column] | Mapping[str, Curve]) -> list[str]:
    """Return the names of the columns that are metrics with at least two numbers."""
    return [
        name
        for name, column in columns.items()
        if len(column.values) > 1
        and not _is_auxiliary(name)
        and find_role(name, columns).kind not in ("sma", "ema")
    ]


def find_role(name: str, names: Collection[str]) -> ColumnRole:
    """Split a column name such as ``loss_ema_0.9`` into metric, kind and setting.

    A name is split only if `names` contains the metric as ``loss`` or ``loss_raw``; ``loss_raw`` is
    split if ``loss`` or one of its averages exists. Any other column is a metric of its own.
    """
    part = _NAME.fullmatch(name)
    if part is None:
        return ColumnRole(name)
    metric, kind, setting = part.groups("")
    known = metric in names or (kind != "raw" and f"{metric}_raw" in names)
    if kind == "raw" and not known:
        others = filter(None, map(_NAME.fullmatch, names))
        known = any(other[1] == metric and other[2] != "raw" for other in others)
    return ColumnRole(metric, cast(Any, kind), setting) if known else ColumnRole(name)


def _is_auxiliary(name: str) -> bool:
    short = _base_name(name)
    return short in (*STEP_COLUMNS, *_TIMES) or any(one.fullmatch(short) for one in (_RATE, _SPEED))


def _base_name(name: str) -> str:
    return name.strip().lower().split("/")[-1]


def _to_integers(steps: NDArray[np.float64]) -> NDArray[np.int64] | NDArray[np.float64]:
    if (np.abs(steps) < 2**53).all() and (steps == np.floor(steps)).all():
        return steps.astype(np.int64)
    return steps


def _is_blank(cell: str) -> bool:
    return cell.strip().lower() in _BLANKS


def parse_column(cells: Sequence[str], delimiter: str = ",") -> Column | None:
    """Return the numbers of a column; None if it contains something else or only blanks.

    If the delimiter is not a comma, decimal commas such as ``0,5`` are accepted.
    """
    rows = [row for row, cell in enumerate(cells) if not _is_blank(cell)]
    try:
        values = [float(cells[row]) for row in rows]
    except ValueError:
        if delimiter == "," or not all(_DECIMAL.fullmatch(cells[row]) for row in rows):
            return None
        values = [float(cells[row].replace(",", ".")) for row in rows]
    return Column(np.array(rows, np.int64), np.array(values, np.float64)) if rows else None


def table_from_cells(cells: dict[str, list[str]], source: str, delimiter: str = ",") -> Table:
    """Return the table of text cells; raise an ArgumentError if no column contains numbers."""
    found = {name: parse_column(column, delimiter) for name, column in cells.items()}
    numbers = {name: column for name, column in found.items() if column is not None}
    if not numbers:
        raise ArgumentError(f"{source}: no column of numbers among {', '.join(cells) or 'none'}")
    return Table(source, numbers, cells, delimiter)
