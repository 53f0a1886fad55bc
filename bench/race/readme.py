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


def cpu_section(folder: Path = RESULTS) -> str:
    """Return the tables of updates and swaps on a CPU, and their provenance."""
    header, rows = load(folder / "cpu.json")
    parts = [_summary(rows, columns) for columns in TABLES]
    return "\n\n".join([*parts, f"{provenance(header)} All figures: `bench/results/cpu.md`."])


SECTIONS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"bench": cpu_section, "gpu": gpu_figures.readme_section},
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
