"""Generate what stands between markers in README.md and docs/ from stored results."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from bench.race import gpu_figures
from bench.race.report import RESULTS, ROOT, Row, align_table, load, number, provenance

TABLES = (
    {
        "Update: gpt2-small, f32 model, f32 average": "GPT-2 small, f32",
        "Update: gpt2-small, bf16 model, f32 average": "bf16, average f32",
        "Update: gpt2-small, bf16 model, bf16 average": "bf16, average bf16",
        "Update: small-1000, f32 model, f32 average": "1,000 small tensors, f32",
    },
    {
        "Swap and back: gpt2-small, f32 model, f32 average": "swap and back, GPT-2 small, f32",
        "Swap and back: gpt2-small, bf16 model, f32 average": "bf16, average f32",
    },
)
"""For each table of the race: title of a case's table -> head of its column."""

README_LOOP = (
    "f32 model, f32 average, 1 thread",
    "f32 model, f32 average, 2 threads",
    "bf16 model, f32 average, 2 threads",
    "bf16 model, bf16 average, 2 threads",
)
"""Titles of the tables of the training loop that README shows."""

HOT = "hot: "
"""Begins the head of a column of repeated calls in a table of the training loop."""


def _cell(row: Row) -> str:
    if row.missing:
        return "raises" if row.missing.startswith("raises") else "–"
    return number(row["ms"]) + ("" if row["ratio"] == 1 else f" ({number(row['ratio'])}×)")


def _summary(rows: list[Row], columns: dict[str, str]) -> str:
    """Return a table of median ms, with multiples of fastema's, by entry and case."""
    cells = {(row.entry, row.table): _cell(row) for row in rows}
    entries = dict.fromkeys(row.entry for row in rows if row.table in columns and not row.missing)
    body = [
        [entry, *(cells.get((entry, table), "–") for table in columns)]
        for entry in sorted(entries, key=lambda name: name.startswith("limit"))
    ]
    return align_table(["median ms (× fastema)", *columns.values()], body)


def _loop_table(title: str, rows: list[Row]) -> str:
    """Return a table of median µs and shares of foreach's speed, by size and contestant."""
    shown = [row for row in rows if row.table == title]
    columns = dict.fromkeys(row.column for row in shown if not row.missing)
    sizes = dict.fromkeys(row.entry for row in shown if not row.missing)
    cells = {
        (row.entry, row.column): f"{number(row['us'])} ({row['speed']:.2f})"
        for row in shown
        if not row.missing
    }
    body = [[size, *(cells[size, column] for column in columns)] for size in sizes]
    return align_table([f"µs: {title}", *columns], body)


def _loop_tables(rows: list[Row], *, readme: bool) -> list[str]:
    """Return README's tables, without repeated calls, or all tables of the docs."""
    titles = dict.fromkeys(row.table for row in rows)
    if readme:
        rows = [row for row in rows if not row.column.startswith(HOT)]
        titles = dict.fromkeys(title for title in titles if title in README_LOOP)
    return [_loop_table(title, rows) for title in titles]


def loop_section(folder: Path = RESULTS) -> str:
    """Return the tables of updates in a training loop, and their provenance."""
    header, rows = load(folder / "loop.json")
    parts = _loop_tables(rows, readme=False)
    return "\n\n".join([*parts, f"{provenance(header)} Method: `bench/results/loop.md`."])


def readme_section(folder: Path = RESULTS) -> str:
    """Return updates in a training loop, in short."""
    header, rows = load(folder / "loop.json")
    parts = [
        *_loop_tables(rows, readme=True),
        f"![Time of an update over the size of the model](bench/results/{header['picture']})",
        f"{provenance(header)} All figures: `bench/results/loop.md`.",
    ]
    return "\n\n".join(parts)


def race_section(folder: Path = RESULTS) -> str:
    """Return updates and swaps of large models, one call after the other, and their provenance."""
    header, rows = load(folder / "cpu.json")
    parts = [_summary(rows, columns) for columns in TABLES]
    return "\n\n".join([*parts, f"{provenance(header)} All figures: `bench/results/cpu.md`."])


SECTIONS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"bench": readme_section, "gpu": gpu_figures.readme_section},
    "docs/benchmarks.md": {"loop": loop_section, "race": race_section},
    "docs/gpu.md": {"gpu": gpu_figures.gpu_section},
    "docs/offload.md": {"gpu": gpu_figures.offload_section},
}
"""File -> name in its markers -> what stands between them, from a folder of results."""


def replace_section(text: str, name: str, section: str) -> str:
    """Return `text` with the section between the markers ``name:start`` and ``name:end`` replaced.

    Raises
    ------
    ValueError
        If a marker is missing.
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if start not in text or end not in text:
        raise ValueError(f"the markers {start} and {end} are missing")
    before, rest = text.split(start, 1)
    _, after = rest.split(end, 1)
    return f"{before}{start}\n{section}\n{end}{after}"


def main(*, check: bool, root: Path = ROOT, results: Path = RESULTS) -> int:
    """Write all sections; with `check`, only compare them, and return 1 if any differs."""
    different = []
    for name, sections in SECTIONS.items():
        path = root / name
        old = new = path.read_text(encoding="utf-8")
        for marker, section in sections.items():
            new = replace_section(new, marker, section(results))
        if new != old:
            different.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and different:
        names = ", ".join(different)
        print(f"{names} differ: run `python -m bench --readme write`", file=sys.stderr)
    return int(check and bool(different))
