"""Rows of results, their tables in Markdown, and their files. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """The figures of one entry of a table.

    Parameters
    ----------
    table
        Title of the table.
    entry
        What was measured; the first cell of the line.
    figures
        Name -> number or other JSON value. Figures named in `FIGURES` or in the question's own
        figures are shown, in the order given here; the others are only stored.
    column
        Head of a column. Rows with the same entry and different columns share a line.
    missing
        Why there are no figures; empty if there are.
    failed
        Whether missing figures are an error.
    """

    table: str
    entry: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    column: str = ""
    missing: str = ""
    failed: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.figures[name]


Rows = Iterable[Row]


@dataclass(frozen=True)
class Figure:
    """How a figure is shown.

    Parameters
    ----------
    head
        Head of its column.
    text
        Formats the value.
    caption
        Show the figure once above the table if all rows have the same value.
    detail
        Omit the figure where rows share a line.
    """

    head: str
    text: Callable[[Any], str]
    caption: bool = False
    detail: bool = False


def number(value: float | None) -> str:
    """Format a number with about three significant digits; return a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if abs(value) >= 10 else 2}f}"


def format_range(ends: Sequence[float]) -> str:
    """Format two numbers as a range."""
    return "–".join(map(number, ends))


_count = "{:,}".format

FIGURES = {
    "n_tensors": Figure("tensors", _count, caption=True),
    "n_elements": Figure("elements", _count, caption=True),
    "bytes_per_element": Figure("bytes per element", "{:.3g}".format, caption=True),
    "rounds": Figure("rounds", _count, caption=True),
    "ms": Figure("ms", number),
    "spread_ms": Figure("p20–p80", format_range, detail=True),
    "us": Figure("µs", number),
    "spread_us": Figure("p20–p80", format_range, detail=True),
    "gbps": Figure("GB/s", number),
    "share_of_limit": Figure("of the limit", "{:.0%}".format),
    "ratio": Figure("time / the first", number),
    "peak_extra_mb": Figure("peak extra MB", number),
    "host_us": Figure("host µs", number),
}
"""Figures that several questions share: `ms` and `us` are medians, spreads are percentiles."""


def align_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table that is aligned as plain text too; the first column is flush left."""
    lines = [head, *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def render(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]) + " |"

    rule = "|" + "|".join(
        "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"
        for column, width in enumerate(widths)
    )
    return "\n".join([render(head), rule + "|", *map(render, lines[1:])])


def _format_figure(row: Row, name: str, figures: Mapping[str, Figure]) -> str:
    if name not in row.figures:
        return ""
    value = row[name]
    return "–" if value is None else figures[name].text(value)


def _tabulate_by_row(
    rows: list[Row], shown: list[str], figures: Mapping[str, Figure]
) -> tuple[list[str], list[list[str]]]:
    """Return head and body of a table with one line per row."""
    body = [[row.entry, *(_format_figure(row, name, figures) for name in shown)] for row in rows]
    return ["", *(figures[name].head for name in shown)], body


def _tabulate_by_entry(
    rows: list[Row], shown: list[str], figures: Mapping[str, Figure]
) -> tuple[list[str], list[list[str]]]:
    """Return head and body of a table with one line per entry and one cell per row."""
    columns = list(dict.fromkeys(row.column for row in rows))
    cells = {
        (row.entry, row.column): " ".join(
            filter(None, (_format_figure(row, name, figures) for name in shown))
        )
        for row in rows
    }
    entries = dict.fromkeys(row.entry for row in rows)
    head = [" ".join(figures[name].head for name in shown), *columns]
    return head, [[entry, *(cells.get((entry, c), "–") for c in columns)] for entry in entries]


def table(title: str, rows: list[Row], figures: Mapping[str, Figure]) -> str:
    """Return a titled table, with the figures common to all rows and a list of what did not run."""
    measured = [row for row in rows if not row.missing]
    names = [n for n in dict.fromkeys(n for row in measured for n in row.figures) if n in figures]
    crossed = any(row.column for row in measured)
    parts = [f"### {title}"]
    caption = [
        n for n in names if figures[n].caption and len({r.figures.get(n) for r in measured}) == 1
    ]
    if caption:
        facts = (f"{figures[n].text(measured[0][n])} {figures[n].head}" for n in caption)
        parts.append(", ".join(facts) + ".")
    if measured:
        shown = [
            n
            for n in names
            if n not in caption and not (crossed and (figures[n].caption or figures[n].detail))
        ]
        parts.append(
            align_table(
                *(_tabulate_by_entry if crossed else _tabulate_by_row)(measured, shown, figures)
            )
        )
    for kind, failed in (("Not run", False), ("Failed", True)):
        out = [row for row in rows if row.missing and row.failed is failed]
        lines = dict.fromkeys(
            f"- {row.entry}{f', {row.column}' * bool(row.column)}: {row.missing}." for row in out
        )
        if lines:
            parts.append(f"{kind}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def provenance(header: Mapping[str, Any]) -> str:
    """Return a paragraph that names machine, threads, versions, command, date and commit."""

    def listed(field: str) -> str:
        return ", ".join(f"{name} {value}" for name, value in header.get(field, {}).items())

    machine = ""
    if "cpu" in header:
        machine = (
            f"{header['cpu']}, {header['cores']} cores, {header['system']} {header['machine']}; "
            f"threads: {listed('threads')}. "
        )
    device = f"{header['device']}; " if "device" in header else ""
    if "kernels" in header:
        device += f"kernels: {header['kernels']}; "
    commit = f", commit {header['commit']}." if header["commit"] else "."
    return (
        f"{device}{machine}{listed('versions')}. `{header['command']}` on {header['date_utc']}"
        + commit
    )


def render_markdown(
    title: str,
    method: str,
    header: Mapping[str, Any],
    rows: Rows,
    figures: Mapping[str, Figure] | None = None,
) -> str:
    """Return a result as a page: title, provenance, picture if any, method, and all tables."""
    by_table: dict[str, list[Row]] = {}
    for row in rows:
        by_table.setdefault(row.table, []).append(row)
    known = {**FIGURES, **(figures or {})}
    tables = [table(name, those, known) for name, those in by_table.items()]
    picture = [f"![{title}]({header['picture']})"] if "picture" in header else []
    return "\n\n".join([f"# {title}", provenance(header), *picture, method, *tables]) + "\n"


def store(folder: Path, name: str, header: Mapping[str, Any], rows: Rows, text: str) -> None:
    """Write a result to ``name.json`` and its page `text` to ``name.md`` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {"header": header, "rows": [_drop_defaults(row) for row in rows]}
    stored = json.dumps(result, indent=1, allow_nan=False) + "\n"
    (folder / f"{name}.json").write_text(stored, encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


def _drop_defaults(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if value or name == "figures"}


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Read a stored result and return its header and rows."""
    result = json.loads(path.read_text(encoding="utf-8"))
    return result["header"], [Row(**row) for row in result["rows"]]
