"""What the quick benchmarks are compared with: counts must be the same, ratios about the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.race.report import RESULTS, Row

FILE = "baseline.json"

EXACT = (
    *("modules", "heavy", "operations", "bytes_per_element", "bytes_per_weight"),
    *("driver_calls", "spilled_bytes"),
)
"""Figures that no machine changes."""

BOUNDED = {"python_kb": 2.0, "instructions_per_element": 1.25, "registers": 1.25}
"""Figures that differ a little from one version of Python, or of a compiler, to the next, and how
many times as large they may become."""

NOISY = 1.5
"""A ratio to a peer of the same run that has become so many times as large is warned of."""


def figures_of(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Return what is compared, by row."""
    found = {}
    for row in rows:
        kept = {name: row[name] for name in (*EXACT, *BOUNDED, "ratio") if name in row.figures}
        if kept or row.missing:
            found[" | ".join(filter(None, (row.table, row.entry, row.column)))] = kept
    return found


def compare(
    found: Mapping[str, Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[str]]:
    """Return what is wrong, and what may be.

    A time is set against that of fastema, the first entry, in the same run: a peer's ratio that has
    fallen means that fastema has become slower beside it.
    """
    wrong = [f"{name}: is not measured any more" for name in known if name not in found]
    noisy = []
    for name, figures in found.items():
        before = known.get(name)
        if not figures:  # a peer that is not installed here
            continue
        if before is None:
            wrong.append(f"{name}: is new; python -m bench QUESTION --quick --baseline write")
            continue
        wrong += [
            f"{name}: {one} is {figures.get(one)}, was {before[one]}"
            for one in EXACT
            if one in before and figures.get(one) != before[one]
        ]
        wrong += [
            f"{name}: {one} is {figures.get(one)}, was {before[one]}"
            for one, factor in BOUNDED.items()
            if one in before and not figures.get(one, 0) <= factor * before[one]
        ]
        now, was = figures.get("ratio"), before.get("ratio")
        if now and was and now < was / NOISY:
            noisy.append(f"{name}: {now:.2f} times fastema's time, was {was:.2f}")
    return wrong, noisy


def read(folder: Path = RESULTS) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the stored figures by question; none where nothing is stored."""
    path = folder / FILE
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def write(name: str, rows: Iterable[Row], folder: Path = RESULTS) -> None:
    """Store a question's figures as what later ones are compared with.

    Those of peers that are not installed here stay.
    """
    known = read(folder)
    before = known.get(name, {})
    found = {row: figures or before.get(row, {}) for row, figures in figures_of(rows).items()}
    known[name] = {row: figures for row, figures in found.items() if figures}
    text = json.dumps(dict(sorted(known.items())), indent=1, sort_keys=True)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def check(name: str, rows: Iterable[Row], folder: Path = RESULTS) -> bool:
    """Print how a question's figures differ from those stored; return whether no count does."""
    known = read(folder).get(name)
    if known is None:
        return True
    wrong, noisy = compare(figures_of(rows), known)
    for line in noisy:
        print(f"{name}: warning: {line}", file=sys.stderr)
    for line in wrong:
        print(f"{name}: {line}", file=sys.stderr)
    return not wrong
