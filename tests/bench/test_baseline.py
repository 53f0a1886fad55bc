"""Counts that differ fail the quick benchmarks, ratios that fall are warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.questions import counts
from bench.race import baseline
from bench.race.report import Row

NEEDS = ("torch",)

FIGURES = {"operations": 0, "python_kb": 4, "ratio": 1.0, "ms": 3.0}
OURS = Row("An update", "fastema.EMA", FIGURES)
PEER = Row("An update", "a peer", {"ratio": 4.0})
GONE = Row("An update", "a peer", missing="is not installed")
ROWS = [OURS, PEER, Row("An update", "another", missing="is not installed")]


def ours(**figures: object) -> list[Row]:
    return [Row("An update", "fastema.EMA", {**FIGURES, **figures}), *ROWS[1:]]


@pytest.mark.parametrize(
    ("rows", "good", "said"),
    [
        (ours(python_kb=8, ms=30.0), True, None),
        (ours(operations=1), False, "An update | fastema.EMA: operations is 1, was 0"),
        (ROWS[1:], False, "An update | fastema.EMA: is not measured any more"),
        ([*ROWS, Row("New", "x", {"ratio": 1.0})], False, "New | x: is new"),
        ([OURS, GONE], True, None),
        (
            [OURS, Row("An update", "a peer", {"ratio": 2.0}), ROWS[2]],
            True,
            "warning: An update | a peer: 2.00 times fastema's time, was 4.00",
        ),
    ],
)
def test_counts_and_rows_fail_and_ratios_warn(
    rows: list[Row], good: bool, said: str | None, tmp_path: Path, capsys: Any
) -> None:
    baseline.write("cpu", ROWS, tmp_path)
    assert baseline.check("unknown", rows, tmp_path)
    assert baseline.check("cpu", rows, tmp_path) is good
    err = capsys.readouterr().err
    assert said in err if said else err == ""
    baseline.write("cpu", [OURS, GONE], tmp_path)
    assert baseline.read(tmp_path)["cpu"]["An update | a peer"] == {"ratio": 4.0}


def test_an_update_asks_pytorch_for_nothing() -> None:
    found = {(row.table, row.entry): row for row in (*counts._modules(), *counts._calls())}
    for (table, entry), row in found.items():
        if "update" in table:
            assert (row["operations"], row["python_kb"]) == (0, 4), entry
    imported = found["Modules of fastema that are imported", "import fastema"]
    assert (imported["modules"], imported["heavy"]) == (2, "none")
    bits = found["100 tensors: an update", "bfloat16, average float32"]["bytes_per_element"]
    assert bits == 10
