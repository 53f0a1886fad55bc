"""Generate the tables between the markers in README.md from the stored CPU race."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.race.report import RESULTS, ROOT, Row, align_table, load, number, provenance

START, END = "<!-- bench:start -->", "<!-- bench:end -->"

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
"""For each table in README.md: title of a case's table -> head of its column."""


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


def section(path: Path = RESULTS / "cpu.json") -> str:
    """Return the section of README.md: tables of updates and swaps, and their provenance."""
    header, rows = load(path)
    parts = [_summary(rows, columns) for columns in TABLES]
    return "\n\n".join([*parts, f"{provenance(header)} All figures: `bench/results/cpu.md`."])


def replace_section(text: str, section: str) -> str:
    """Return `text` with the section between the markers replaced.

    Raises
    ------
    ValueError
        If a marker is missing.
    """
    if START not in text or END not in text:
        raise ValueError(f"README.md lacks the markers {START} and {END}")
    before, rest = text.split(START, 1)
    _, after = rest.split(END, 1)
    return f"{before}{START}\n{section}\n{END}{after}"


def main(*, check: bool, readme: Path = ROOT / "README.md") -> int:
    """Write the section; with `check`, only compare it, and return 1 if README.md differs."""
    old = readme.read_text(encoding="utf-8")
    new = replace_section(old, section())
    if not check:
        readme.write_text(new, encoding="utf-8")
    elif new != old:
        print("README.md differs: run `python -m bench --readme write`", file=sys.stderr)
    return int(check and new != old)
