"""Readers of training logs: CSV, JSON, JSON Lines and TensorBoard event files."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from fastema.errors import ArgumentError
from fastema.tracking.logs import event_files
from fastema.tracking.logs.table import Curve, Table, parse_column, table_from_cells

__all__ = ["Curve", "Table", "read", "read_table"]

_DELIMITERS: Final = (",", "\t", ";", "|", " ")
_SAMPLE_LINES: Final = 20


def read(source: str | os.PathLike[str] | TextIO, step: str | None = None) -> dict[str, Curve]:
    """Return the curves of a training log by name.

    Parameters
    ----------
    source : path or text file
        CSV with a header line and any usual separator, JSON Lines, JSON (rows, names with lists,
        ``trainer_state.json``), an event file, or a folder of event files. If a folder has several
        runs, names begin with the run, as in ``train/loss``.
    step : str, optional
        Column that counts the steps; by default `Table.step_column` finds it.

    Raises
    ------
    ArgumentError
        If the source is not a log, or ``step`` cannot count the steps.
    """
    table = read_table(source)
    return table.curves(table.step_column(step))


def read_table(source: str | os.PathLike[str] | TextIO) -> Table:
    """Return a training log as a table, see `read`; raise an ArgumentError if it is not a log."""
    name = str(getattr(source, "name", "the text"))
    try:
        if isinstance(source, (str, os.PathLike)):
            path = Path(source)
            name = str(path)
            if path.is_dir() or ".tfevents." in path.name:
                return event_files.read(path)
            text = path.read_text(encoding="utf-8-sig")
        else:
            text = source.read()
    except UnicodeDecodeError:
        raise ArgumentError(
            f"{name} is not a text file; logs are CSV, JSON, JSON Lines or TensorBoard event files "
            "(with .tfevents. in their names)"
        ) from None
    if not text.strip():
        raise ArgumentError(f"{name} is empty")
    return _read_json(text, name) if text.lstrip()[0] in "{[" else _csv(text, name)


def _csv(text: str, source: str) -> Table:
    if "\0" in text:
        raise ArgumentError(f"{source} is not a text file; the first line must name the columns")
    delimiter = _detect_delimiter(text, source)
    rows = _read_rows(io.StringIO(text), delimiter, source)
    _, header = next(rows, (0, []))
    if not header:
        raise ArgumentError(f"{source} has no column names: its lines are empty")
    names = [name.strip() for name in header]
    # The index column of a data frame has no name.
    names = [name or (f"column {place}" if place else "index") for place, name in enumerate(names)]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ArgumentError(f"{source}: two columns are named {', '.join(twice)}")
    if all(parse_column([name]) is not None for name in names):
        raise ArgumentError(
            f"{source}: the first line contains numbers; it must name the columns, such as "
            f"{delimiter.join(['step', 'loss'])}"
        )
    columns: list[list[str]] = [[] for _ in names]
    for line, row in rows:
        if len(row) > len(names):
            raise ArgumentError(
                f"{source}, line {line}: {len(row)} cells, but the first line names {len(names)} "
                "columns"
            )
        # The last line may be incomplete while the run goes on.
        for column, cell in itertools.zip_longest(columns, row, fillvalue=""):
            column.append(cell)  # type: ignore[union-attr]
    if not columns[0]:
        raise ArgumentError(f"{source}: the columns have names, but there is no row yet")
    return table_from_cells(dict(zip(names, columns, strict=True)), source, delimiter)


def _read_rows(
    lines: Iterable[str], delimiter: str, source: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not empty, with the number of its last line, from 1."""
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter == " ")
    try:
        for row in reader:
            if delimiter == " " and row and not row[-1]:
                row.pop()  # a trailing space is not a separator
            if any(row):
                yield reader.line_num, row
    except csv.Error as error:
        raise ArgumentError(f"{source}, line {reader.line_num}: {error}") from None


def _detect_delimiter(text: str, source: str) -> str:
    """Return the separator that splits the first lines into the most cells, equally many each."""
    # The last line may be incomplete.
    whole = text[: text.rfind("\n") + 1] or text

    def cells(delimiter: str) -> tuple[bool, int]:
        sample = itertools.islice(_read_rows(io.StringIO(whole), delimiter, source), _SAMPLE_LINES)
        try:
            counts = [len(row) for _, row in sample]
        except ArgumentError:  # the line has no such separator and is too long for one cell
            return False, 0
        return len(set(counts)) == 1 and counts[0] > 1, max(counts[:1], default=0)

    # In a tie the first wins: a comma if no separator occurs.
    return max(_DELIMITERS, key=cells)


def _read_json(text: str, source: str) -> Table:
    try:
        found = _parse_json(text, source)
    except ValueError:
        found = _parse_json_lines(text, source)
    if isinstance(found, dict) and isinstance(found.get("log_history"), list):
        found = found["log_history"]
    if isinstance(found, dict) and found and all(isinstance(row, list) for row in found.values()):
        length = max(map(len, found.values()))
        cells = {
            _printable(str(name)): [_format_cell(value) for value in column]
            for name, column in found.items()
        }
        for column in cells.values():
            column += [""] * (length - len(column))
        return table_from_cells(cells, source)
    return from_rows([found] if isinstance(found, dict) else found, source)


def _parse_json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ArgumentError(f"{source}: its nesting is too deep for a log") from None


def _parse_json_lines(text: str, source: str) -> list[Any]:
    lines = text.splitlines()
    rows: list[Any] = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(_parse_json(line, source))
        except ArgumentError:
            raise
        except ValueError as error:
            if number == len(lines) and rows and not text.endswith("\n"):
                break  # the last line is incomplete while the run goes on
            raise ArgumentError(
                f"{source}, line {number}: neither JSON nor one JSON object per line: {error}"
            ) from None
    return rows


def from_rows(rows: object, source: str) -> Table:
    """Return the table of a list of mappings, such as the ``log_history`` of Hugging Face."""
    if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise ArgumentError(
            f"{source}: expected rows that name their values, such as "
            '{"step": 10, "loss": 0.5}, or names with lists of values'
        )
    try:
        flat = [dict(_flatten(row)) for row in rows]
    except RecursionError:
        raise ArgumentError(f"{source}: its nesting is too deep for a log") from None
    names = dict.fromkeys(itertools.chain.from_iterable(flat))
    cells = {name: [row.get(name, "") for row in flat] for name in names}
    return table_from_cells(cells, source)


def _flatten(row: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names and cells of a row; a nested mapping yields names ``outer/inner``."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield _printable(f"{prefix}{name}"), _format_cell(value)


def _printable(text: str) -> str:
    """Return the text with lone surrogates, which no file can store, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _format_cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return _printable(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a scalar of NumPy or a framework
    # NumPy's subclass of float has another repr.
    return float.__repr__(value) if isinstance(value, float) else json.dumps(value, default=str)
