"""Logs and event files of every kind, read as curves."""

import csv
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema.errors import ArgumentError
from fastema.tracking.logs import Curve, read, read_table

NEEDS = ("tensorboard",)

# Protocol buffers warn of future removals.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
# Column names: no surrounding blanks, and not a bare number.
NAMES = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=8
).map("n{}".format)


def assert_curve(curve: Curve, steps: Any, values: Any) -> None:
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
def test_csv_file_is_read_as_its_columns(
    names: list[str], delimiter: str, blank: str, data: st.DataObject
) -> None:
    row = st.lists(st.none() | NUMBERS, min_size=len(names), max_size=len(names))
    rows = data.draw(st.lists(row, min_size=3, max_size=9))
    rows[1] = [1.5] * len(names)  # so that no column is all blank
    written = [[blank if cell is None else repr(cell) for cell in row] for row in rows]
    # Remove separators from names, so that the header has only one candidate.
    names = [re.sub(r"[,;\t|]", "", name) + str(i) for i, name in enumerate(names)]
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([names, *written])
    file.seek(0)
    curves = read(file)
    kept = [row for row, cells in zip(rows, written, strict=True) if any(cells)]
    assert list(curves) == names
    for column, name in enumerate(names):
        steps = [step for step, row in enumerate(kept) if row[column] is not None]
        assert_curve(curves[name], steps, [kept[step][column] for step in steps])


@pytest.mark.parametrize(
    ("header", "rows", "counted_by"),
    [
        ("epoch,step,loss", [(0, 0, 9), (0, 10, 8), (1, 20, 7)], "step"),
        ("Epoch,loss", [(0, 9), (1, 8)], "Epoch"),
        ("global_step,epoch,loss", [(3, 0, 9), (4, 0, 8)], "global_step"),
        # The batch restarts in each epoch, and an epoch has several batches.
        ("epoch,batch,loss", [(0, 0, 9), (0, 1, 8), (1, 0, 7), (1, 1, 6)], None),
        # A resumed run.
        ("step,loss", [(0, 9), (1, 8), (1, 7)], None),
        ("step,loss", [(0, 9), ("nan", 8), (2, 7)], None),
        ("loss,acc", [(9, 1), (8, 2)], None),
    ],
)
def test_step_column_must_rise(header: str, rows: list[Any], counted_by: str | None) -> None:
    text = "\n".join([header, *(",".join(map(str, row)) for row in rows)])
    table = read_table(io.StringIO(text))
    assert table.step_column() == counted_by
    place = header.split(",").index(counted_by) if counted_by else None
    steps = range(len(rows)) if place is None else [row[place] for row in rows]
    assert_curve(read(io.StringIO(text))["loss"], list(steps), table.numbers["loss"].values)


def test_named_column_gives_the_steps_as_integers_if_whole() -> None:
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
    ids=["trainer_state", "list", "lines", "lines, the last one incomplete"],
)
def test_json_rows_are_read_as_curves(text: str) -> None:
    curves = read(io.StringIO(text))
    assert_curve(curves["loss"], [10, 20], [2.5, 0.1 + 0.2])
    assert_curve(curves["eval_loss"], [10, 20], [2.25, math.nan])
    assert_curve(curves["epoch"], [10, 10, 20, 20], [0.5, 0.5, 1.0, 1.0])
    assert "note" not in curves


LONG = "9" * 70_000  # two are too long for one cell


@pytest.mark.parametrize(
    "text",
    [
        "step  loss   acc \n  1  0.5   0.25\n 2  0.25  0.5 \n",
        "step;loss;acc\n1;0,5;0,25\n2;0,25;0,5\n",
        f"step\tloss\tacc\tx\ty\n1\t0.5\t0.25\t{LONG}\t{LONG}\n2\t0.25\t0.5\t1\t1\n",
        '{"step": [1, 2, 3], "loss": [0.5, 0.25, null], "acc": [0.25, 0.5]}',
        json.dumps([{"step": n, "of": {"loss": 1 / 2**n, "acc": n / 4}} for n in (1, 2)]),
    ],
    ids=["spaces", "decimal commas", "long lines", "lists of JSON", "nested JSON"],
)
def test_separators_and_layouts_give_the_same_curves(text: str) -> None:
    table = read_table(io.StringIO(text))
    curves = {name.removeprefix("of/"): curve for name, curve in table.curves("step").items()}
    assert_curve(curves["loss"], [1, 2], [0.5, 0.25])
    assert_curve(curves["acc"], [1, 2], [0.25, 0.5])
    assert len(set(map(len, table.cells.values()))) == 1


TABLE = (
    "epoch,step,loss,val_loss,lr,lr-SGD,time,acc,acc_ema,acc_sma_20,grad_ema,once,gain_raw,gain_ema\n"
    "0,0,3,1,1,1,1,4,4,4,4,1,1,1\n0,1,2,1,1,1,2,5,5,5,5,,1,1\n"
)


def test_metrics_are_selected_by_pattern_or_by_default() -> None:
    table = read_table(io.StringIO(TABLE))
    # grad_ema counts as a metric: there is no column grad.
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
        ('""\n""\n', "no column names: its lines are empty"),
        ("a,b\n\0,1\n", "is not a text file; the first line must name the columns"),
        (f"step,loss\n1,{LONG * 2}\n", "line 2: field larger than field limit"),
        ("step,loss\n", "no row yet"),
        ("1,2\n3,4\n", "the first line contains numbers; it must name the columns"),
        ("step,loss\n1,2\n2,3,4\n", "line 3: 3 cells, but the first line names 2"),
        ("loss,loss,acc\n1,2,3\n", "two columns are named loss"),
        ("name,note\na,b\n", "no column of numbers among name, note"),
        ('{"loss": 1}\n{"loss": }\n{"loss": 3}\n', "line 2: neither JSON nor"),
        ('{"loss": 1,\n', "line 1: neither JSON nor"),
        ("[1, 2]", "expected rows that name their values"),
        ("[]", "no column of numbers among none"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "its nesting is too deep for a log"),
    ],
    ids=lambda value: value[:40],
)
def test_text_that_is_no_log_is_refused(text: str, complaint: str) -> None:
    source = io.StringIO(text)
    source.name = "run.log"
    with pytest.raises(ArgumentError, match=complaint) as raised:
        read(source)
    assert "run.log" in str(raised.value)


def test_unreadable_columns_and_files_are_refused(tmp_path: Path) -> None:
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
    with pytest.raises(ArgumentError, match=r"weights.bin is not a text file.*tfevents"):
        read(binary)


Points = list[tuple[int, float]]


def write(
    folder: Path, tags: dict[str, Points], *, kind: str = "tensor", restart: int | None = None
) -> None:
    """Add an event file to a folder with the writer of the tensorboard package."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    number = len(list(folder.glob("*"))) if folder.exists() else 0
    writer = EventFileWriter(str(folder), filename_suffix=f".{number}")
    # Names sort by their creation time in seconds, which is equal here: the suffix decides.
    if restart is not None:
        log = SessionLog(status=SessionLog.START)
        writer.add_event(Event(step=restart, session_log=log))
    for tag, points in tags.items():
        for place, (step, value) in enumerate(points):
            if kind == "simple":
                one = Summary.Value(tag=tag, simple_value=value)
            else:
                plugin = SummaryMetadata.PluginData(plugin_name=kind)
                metadata = SummaryMetadata(plugin_data=plugin) if place == 0 else None
                tensor = make_tensor_proto(np.float32(value))
                one = Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
            writer.add_event(Event(step=step, summary=Summary(value=[one])))
    writer.close()


def assert_points(curve: Curve, points: Points) -> None:
    """Assert that a curve equals the points in float32, as event files store them."""
    assert_curve(curve, [step for step, _ in points], np.float32([value for _, value in points]))


def points(count: int, seed: int, start: int = 0) -> Points:
    values = np.random.default_rng(seed).normal(size=count).tolist()
    return list(enumerate(values, start))


def test_runs_in_subfolders_are_prefixed_and_non_scalars_ignored(tmp_path: Path) -> None:
    write(tmp_path, {"text": points(3, 1)}, kind="text")
    with pytest.raises(ArgumentError, match="no scalars in the TensorBoard event files"):
        read(tmp_path)
    for seed, run in enumerate((".", "train", "deep/er")):
        write(tmp_path / run, {"loss": points(4, seed), "step": points(4, seed)}, kind="scalars")
    curves = read(tmp_path)
    assert "text" not in curves
    for seed, prefix in enumerate(("", "train/", "deep/er/")):
        assert_points(curves[f"{prefix}loss"], points(4, seed))
    assert set(read(tmp_path / "train")) == {"global_step", "loss", "step"}


def test_restarted_run_drops_the_points_from_its_step_on(tmp_path: Path) -> None:
    write(tmp_path, {"loss": points(8, 1)}, kind="simple")
    write(tmp_path, {"loss": points(5, 2, start=5)}, kind="simple", restart=5)
    assert_points(read(tmp_path)["loss"], [*points(8, 1)[:5], *points(5, 2, start=5)])


def test_truncated_event_file_is_read_but_a_damaged_one_refused(tmp_path: Path) -> None:
    its = points(50, 1)
    write(tmp_path, {"loss": its}, kind="simple")
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    assert_points(read(tmp_path)["loss"], its[:-1])
    half = len(content) // 2
    file.write_bytes(content[:half] + content[half + 1 :])
    with pytest.raises(ArgumentError, match=r"tfevents.* or damaged, at byte \d+$"):
        read(file)


def test_missing_event_files_or_tensorboard_give_a_helpful_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=r"no TensorBoard event file in this folder$"):
        read(tmp_path)
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ArgumentError, match=r"did you mean\n  - .*version_0.metrics.csv"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "events.out.tfevents.1")
    write(tmp_path, {"loss": points(3, 1)})
    monkeypatch.setitem(sys.modules, "tensorboard.util.tensor_util", None)
    with pytest.raises(ArgumentError, match="pip install tensorboard"):
        read(tmp_path)


@pytest.mark.tensorflow
def test_only_scalars_of_tensorflow_summaries_are_read(tmp_path: Path) -> None:
    import tensorflow as tf

    values = np.random.default_rng(0).normal(size=30).astype(np.float32)
    writer = tf.summary.create_file_writer(str(tmp_path))
    with writer.as_default():
        tf.summary.image("image", np.random.default_rng(1).random((1, 300, 300, 3)), step=0)
        for step, value in enumerate(values):
            tf.summary.scalar("loss", value, step=5 * step)
            tf.summary.histogram("weights", values, step=5 * step)
            tf.summary.text("note", "text", step=5 * step)
    writer.close()
    curves = read(tmp_path)
    assert set(curves) == {"step", "loss"}
    assert curves["loss"].steps.tolist() == list(range(0, 150, 5))
    np.testing.assert_array_equal(curves["loss"].values, values)
