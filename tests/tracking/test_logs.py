"""Logs of every kind come back as the curves they were written from, to the bit."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema.errors import ArgumentError
from fastema.tracking.logs import Curve, from_rows, read, read_table

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
# What stands in a header: anything but blanks around it, and not a number alone.
NAMES = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=8
).map("n{}".format)


def same(curve: Curve, steps: Any, values: Any) -> None:
    np.testing.assert_array_equal(curve.steps, steps)
    assert curve.values.dtype == np.float64
    want = np.asarray(values, np.float64)
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(curve.values), nan)
    # Zeros keep their sign.
    assert curve.values[~nan].tobytes() == want[~nan].tobytes()


@given(
    names=st.lists(NAMES, min_size=2, max_size=4),
    delimiter=st.sampled_from(",;\t|"),
    blank=st.sampled_from(["", "NA", "None", "null"]),
    data=st.data(),
)
def test_a_csv_file_comes_back(
    names: list[str], delimiter: str, blank: str, data: st.DataObject
) -> None:
    row = st.lists(st.none() | NUMBERS, min_size=len(names), max_size=len(names))
    rows = data.draw(st.lists(row, min_size=3, max_size=9))
    rows[1] = [1.5] * len(names)  # no column is all blank
    written = [[blank if cell is None else repr(cell) for cell in row] for row in rows]
    # A header of names without the separator cannot be mistaken for one of another separator.
    names = [re.sub(r"[,;\t|]", "", name) + str(i) for i, name in enumerate(names)]
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([names, *written])
    file.seek(0)
    curves = read(file)
    kept = [row for row, cells in zip(rows, written, strict=True) if any(cells)]
    assert list(curves) == names
    for column, name in enumerate(names):
        steps = [step for step, row in enumerate(kept) if row[column] is not None]
        same(curves[name], steps, [kept[step][column] for step in steps])


@pytest.mark.parametrize(
    ("header", "rows", "counted_by"),
    [
        ("epoch,step,loss", [(0, 0, 9), (0, 10, 8), (1, 20, 7)], "step"),
        ("Epoch,loss", [(0, 9), (1, 8)], "Epoch"),
        ("global_step,epoch,loss", [(3, 0, 9), (4, 0, 8)], "global_step"),
        ("iteration,loss", [(3, 1), (1000, 2)], "iteration"),
        # Begins anew in each epoch, and an epoch has many batches.
        ("epoch,batch,loss", [(0, 0, 9), (0, 1, 8), (1, 0, 7), (1, 1, 6)], None),
        # A run that was taken up again.
        ("step,loss", [(0, 9), (1, 8), (1, 7)], None),
        ("step,loss", [(0, 9), ("nan", 8), (2, 7)], None),
        ("loss,acc", [(9, 1), (8, 2)], None),
    ],
)
def test_the_column_that_counts(header: str, rows: list[Any], counted_by: str | None) -> None:
    text = "\n".join([header, *(",".join(map(str, row)) for row in rows)])
    table = read_table(io.StringIO(text))
    assert table.step_column() == counted_by
    place = header.split(",").index(counted_by) if counted_by else None
    steps = range(len(rows)) if place is None else [row[place] for row in rows]
    same(read(io.StringIO(text))["loss"], list(steps), table.numbers["loss"].values)


def test_steps_are_of_the_column_that_is_named_and_whole_where_they_can_be() -> None:
    def steps(text: str, step: str | None = None) -> np.ndarray:
        return read(io.StringIO(text), step=step)["loss"].steps

    text = "seen,step,loss\n16,0,3\n32,1,2\n"
    assert steps(text).tolist() == [0, 1]
    assert steps(text, "seen").tolist() == [16, 32]
    with pytest.raises(ArgumentError, match="no column 'time'"):
        steps(text, "time")
    with pytest.raises(ArgumentError, match="'seen' cannot count the steps"):
        steps("seen,loss\n1,2\n,3\n", "seen")
    assert steps("epoch,loss\n1.0,3\n2.0,2\n").dtype == np.int64
    assert steps("epoch,loss\n0.5,3\n1,2\n").tolist() == [0.5, 1.0]


ROWS: list[dict[str, Any]] = [
    {"loss": 2.5, "lr": 1e-3, "step": 10, "epoch": 0.5},
    {"eval_loss": 2.25, "step": 10, "epoch": 0.5, "note": "x"},
    {"loss": 0.1 + 0.2, "lr": 5e-4, "step": 20, "epoch": 1.0},
    {"eval_loss": math.nan, "step": 20, "epoch": 1.0},
]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"best_metric": None, "log_history": ROWS, "global_step": 20}),
        json.dumps(ROWS, indent=2),
        "\n".join(map(json.dumps, ROWS)),
        "\n\n".join(map(json.dumps, ROWS)) + '\n{"loss": 0.2, "st',
    ],
    ids=["trainer_state", "list", "lines", "lines, the last one not done"],
)
def test_rows_of_json(text: str) -> None:
    curves = read(io.StringIO(text))
    same(curves["loss"], [10, 20], [2.5, 0.1 + 0.2])
    same(curves["eval_loss"], [10, 20], [2.25, math.nan])
    same(curves["epoch"], [10, 10, 20, 20], [0.5, 0.5, 1.0, 1.0])
    assert "note" not in curves


def test_columns_of_json_and_values_within_rows() -> None:
    text = json.dumps({"loss": [3, 2, 1], "val_loss": [2.5, None, 1.5], "name": ["a", "b", "c"]})
    curves = read(io.StringIO(text))
    assert set(curves) == {"loss", "val_loss"}
    same(curves["loss"], [0, 1, 2], [3, 2, 1])
    same(curves["val_loss"], [0, 2], [2.5, 1.5])
    nested = '{"step": 1, "train": {"loss": 2.0}}\n{"step": 2, "train": {"loss": 1.0}}\n'
    same(read(io.StringIO(nested))["train/loss"], [1, 2], [2, 1])
    rows = [{"step": np.int64(3), "loss": np.float32(0.1)}, {"step": 4, "loss": np.float64(0.2)}]
    same(from_rows(rows, "history").curves("step")["loss"], [3, 4], [float(np.float32(0.1)), 0.2])


TABLE = (
    "epoch,step,loss,val_loss,lr,lr-SGD,time,acc,acc_ema,acc_sma_20,grad_ema,once,gain_raw,gain_ema\n"
    "0,0,3,1,1,1,1,4,4,4,4,1,1,1\n0,1,2,1,1,1,2,5,5,5,5,,1,1\n"
)


def test_metrics_are_those_named_or_what_is_worth_averaging() -> None:
    table = read_table(io.StringIO(TABLE))
    # grad_ema is the average of nothing that is here.
    assert table.metrics() == ["loss", "val_loss", "acc", "grad_ema", "gain_raw"]
    assert table.metrics(["lr", "*loss", "loss"]) == ["lr", "loss", "val_loss"]
    assert table.metrics(["once"]) == ["once"]
    with pytest.raises(ArgumentError, match=r"no column 'los'; those with numbers are\n  - epoch"):
        table.metrics(["loss", "los"])
    assert read_table(io.StringIO("a[1],a1\n1,2\n")).metrics(["a[1]"]) == ["a[1]"]
    with pytest.raises(ArgumentError, match=r"looks like a metric.*\n  - step"):
        read_table(io.StringIO("step,lr\n1,2\n2,3\n")).metrics()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (" \n\n", "is empty"),
        ("step,loss\n", "no row yet"),
        ("1,2\n3,4\n", "the first line holds numbers; it has to name the columns"),
        ("step,loss\n1,2\n2,3,4\n", "line 3: 3 cells, but the first line names 2"),
        ("loss,loss,acc\n1,2,3\n", "two columns are called loss"),
        ("name,note\na,b\n", "no column of numbers among name, note"),
        ('{"loss": 1}\n{"loss": }\n{"loss": 3}\n', "line 2: neither JSON nor"),
        ('{"loss": 1,\n', "line 1: neither JSON nor"),
        ("[1, 2]", "expected rows that name their values"),
        ("[]", "no column of numbers among none"),
        ('"', "its lines are empty"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "it is nested deeper than any log"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_no_log(text: str, complaint: str) -> None:
    source = io.StringIO(text)
    source.name = "run.log"
    with pytest.raises(ArgumentError, match=complaint) as raised:
        read(source)
    assert "run.log" in str(raised.value)


def test_columns_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    table = read_table(io.StringIO("step,loss,empty\n0,1,\n1,diverged,\n"))
    assert "loss" not in table.curves()
    with pytest.raises(ArgumentError, match="'loss' holds no numbers: row 2 has 'diverged'"):
        table.column("loss")
    with pytest.raises(ArgumentError, match="'empty' holds no numbers: all of its cells are blank"):
        table.column("empty")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.csv")
    binary = tmp_path / "weights.bin"
    binary.write_bytes(bytes(range(256)))
    with pytest.raises(ArgumentError, match=r"weights.bin is no text.*tfevents"):
        read(binary)
