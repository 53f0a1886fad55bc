"""A page that compares the CPU race on several machines."""

from __future__ import annotations

from pathlib import Path

from bench.race.readme import TABLES
from bench.race.report import RESULTS, Row, align_table, load, number

PAGE = "machines.md"

INTRODUCTION = """\
# The CPU race on several machines

Medians of fastema in ms, and of the others as multiples of it, each from the machine's own
`cpu.json`. `make bench ARGS="--out bench/results/NAME"` measures another machine, and
`python -m bench --machines` writes this page."""


def _cell(row: Row | None) -> str:
    if row is None or row.missing:
        return "–"
    return f"{number(row['ms'])} ms" if row["ratio"] == 1 else f"{number(row['ratio'])}×"


def render_page(folder: Path = RESULTS) -> str:
    """Return a page of the CPU results in a folder and its direct subfolders."""
    found = {}
    for path in sorted(folder.glob("cpu.json")) + sorted(folder.glob("*/cpu.json")):
        header, rows = load(path)
        name = f"{header['cpu']}, {header['cores']} cores"
        if path.parent != folder:
            name = f"{path.parent.name}: {name}"
        found[name] = {(row.table, row.entry): row for row in rows}
    parts = [INTRODUCTION]
    for title in (title for columns in TABLES for title in columns):
        entries = dict.fromkeys(
            entry for rows in found.values() for table, entry in rows if table == title
        )
        body = [
            [entry, *(_cell(rows.get((title, entry))) for rows in found.values())]
            for entry in sorted(entries, key=lambda entry: entry.startswith("limit"))
        ]
        parts += [f"## {title}", align_table(["", *found], body)]
    return "\n\n".join(parts) + "\n"


def write(folder: Path = RESULTS) -> None:
    """Write the page into the folder of the results."""
    (folder / PAGE).write_text(render_page(folder), encoding="utf-8")
