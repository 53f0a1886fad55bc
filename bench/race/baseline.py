"""Compare quick benchmarks with a stored baseline, and speeds with the least that is accepted.

Counts must match the baseline, times nearly so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.race.report import RESULTS, Row

FILE = "baseline.json"

EXACT = (
    *("modules", "heavy", "operations", "bytes_per_element", "bytes_per_weight"),
    *("driver_calls", "spilled_bytes"),
)
"""Figures that are the same on every machine."""

BOUNDED = {"python_kb": 2.0, "instructions_per_element": 1.25, "registers": 1.25}
"""Figures that vary a little between versions of Python or of a compiler, with the factor by which
they may grow."""

NOISY = 1.5
"""Factor by which a peer's ratio to fastema may fall before a warning is printed."""


def figures_of(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Return the figures to compare, by row."""
    found = {}
    for row in rows:
        kept = {name: row[name] for name in (*EXACT, *BOUNDED, "ratio") if name in row.figures}
        if kept or row.missing:
            found[_name(row)] = kept
    return found


def _name(row: Row) -> str:
    return " | ".join(filter(None, (row.table, row.entry, row.column)))


def find_slow(rows: Iterable[Row]) -> list[str]:
    """Return messages about rows whose `speed`, relative to a peer's, is below `least_speed`.

    Both were measured in one run, so the speed of the machine does not matter.
    """
    return [
        f"{_name(row)}: {row['speed']:.2f} of the peer's speed, {row['least_speed']} is the least"
        for row in rows
        if "least_speed" in row.figures and row["speed"] < row["least_speed"]
    ]


def compare(
    found: Mapping[str, Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[str]]:
    """Return messages about errors and about possible slowdowns.

    A peer's ratio is its time over that of fastema, the first entry, in the same run. A ratio that
    has fallen means that fastema has become slower than before, relative to this peer.
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
    """Read the stored figures by question; return an empty dict if nothing is stored."""
    path = folder / FILE
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def write(name: str, rows: Iterable[Row], folder: Path = RESULTS) -> None:
    """Store a question's figures in the baseline.

    Figures of peers that are not installed here are kept.
    """
    known = read(folder)
    before = known.get(name, {})
    found = {row: figures or before.get(row, {}) for row, figures in figures_of(rows).items()}
    known[name] = {row: figures for row, figures in found.items() if figures}
    text = json.dumps(dict(sorted(known.items())), indent=1, sort_keys=True)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def check(name: str, rows: Sequence[Row], folder: Path = RESULTS) -> bool:
    """Print what is too slow and how a question's figures differ from the baseline.

    Return True if nothing is too slow, and only times differ or the baseline has no figures of the
    question.
    """
    known = read(folder).get(name)
    wrong, noisy = ([], []) if known is None else compare(figures_of(rows), known)
    wrong += find_slow(rows)
    for line in noisy:
        print(f"{name}: warning: {line}", file=sys.stderr)
    for line in wrong:
        print(f"{name}: {line}", file=sys.stderr)
    return not wrong
