"""Counts that differ fail the quick benchmarks, ratios that fall are warned of."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.questions import counts
from bench.race import baseline
from bench.race.report import Row

NEEDS = ("torch",)


def rows(**figures: object) -> list[Row]:
    first = {"operations": 0, "python_kb": 4, "ratio": 1.0, "ms": 3.0}
    return [
        Row("An update", "fastema.EMA", {**first, **figures}),
        Row("An update", "a peer", {"ratio": 4.0}),
        Row("An update", "another", missing="is not installed"),
    ]


def test_the_same_figures_pass_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline.write("cpu", rows(), tmp_path)
    assert baseline.check("cpu", rows(python_kb=8, ms=30.0), tmp_path)
    assert baseline.check("unknown", rows(), tmp_path)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"operations": 1}, "operations is 1, was 0"),
        ({"python_kb": 12}, "python_kb is 12, was 4"),
    ],
)
def test_another_count_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], figures: dict[str, int], said: str
) -> None:
    baseline.write("cpu", rows(), tmp_path)
    assert not baseline.check("cpu", rows(**figures), tmp_path)
    assert f"cpu: An update | fastema.EMA: {said}" in capsys.readouterr().err


def test_rows_that_come_or_go_fail_unless_a_peer_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline.write("cpu", rows(), tmp_path)
    assert not baseline.check("cpu", rows()[1:], tmp_path)
    assert "fastema.EMA: is not measured any more" in capsys.readouterr().err
    assert not baseline.check("cpu", [*rows(), Row("New", "x", {"ratio": 1.0})], tmp_path)
    assert "New | x: is new" in capsys.readouterr().err
    gone = Row("An update", "a peer", missing="is not installed")
    assert baseline.check("cpu", [rows()[0], gone], tmp_path)
    baseline.write("cpu", [rows()[0], gone], tmp_path)
    assert baseline.read(tmp_path)["cpu"]["An update | a peer"] == {"ratio": 4.0}


def test_a_ratio_that_has_fallen_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline.write("cpu", rows(), tmp_path)
    slower = [rows()[0], Row("An update", "a peer", {"ratio": 2.0}), rows()[2]]
    assert baseline.check("cpu", slower, tmp_path)
    assert "warning: An update | a peer: 2.00 times fastema's time, was 4.00" in (
        capsys.readouterr().err
    )


def test_an_update_asks_pytorch_for_nothing() -> None:
    found = {(row.table, row.entry): row for row in (*counts._modules(), *counts._calls())}
    for (table, entry), row in found.items():
        if "update" in table:
            assert (row["operations"], row["python_kb"]) == (0, 4), entry
    imported = found["Modules of fastema that are imported", "import fastema"]
    assert (imported["modules"], imported["heavy"]) == (2, "none")
    bits = found["100 tensors: an update", "bfloat16, average float32"]["bytes_per_element"]
    assert bits == 10
