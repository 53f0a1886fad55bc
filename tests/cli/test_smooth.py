"""``fastema smooth``: the added columns are the exact moving averages of the others."""

import csv
import importlib.util
import io
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastema.tracking import ExponentialMovingAverage, SimpleMovingAverage

from ..support.requirements import require_packages


def make_log(count: int = 200, seed: int = 0) -> str:
    """Make a log with a validation loss in every 20th row, a note and a learning rate."""
    generator = np.random.default_rng(seed)
    lines = ["epoch,step,loss,val_loss,lr,note,size"]
    for step, noise in enumerate(generator.normal(size=count).tolist()):
        loss = 2.0 * math.exp(-step / 50) + 0.1 * noise
        val = repr(loss + 0.25) if step % 20 == 19 else ""
        lines.append(f'{step // 20},{step},{loss!r},{val},0.10,"a, b",{16 + step % 5}')
    return "\n".join(lines) + "\n"


def read_columns(text: str, delimiter: str = ",") -> dict[str, list[str]]:
    header, *rows = csv.reader(io.StringIO(text), delimiter=delimiter)
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))


def average_column(average: Any, cells: list[str], weights: list[str] | None = None) -> list[str]:
    """Return the cells of the column that an average makes from another column."""
    rows = [row for row, cell in enumerate(cells) if cell]
    given_ = [float(weights[row]) for row in rows] if weights else None
    column = [""] * len(cells)
    series = average.update_many([float(cells[row]) for row in rows], given_)
    for row, value in zip(rows, series.tolist(), strict=True):
        column[row] = repr(value)
    return column


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "metrics.csv"
    file.write_text(make_log())
    return file


@pytest.fixture
def smooth(fastema: Callable[..., Any]) -> Callable[..., Any]:
    return partial(fastema, "smooth")


def test_added_columns_are_the_moving_averages(path: Path, tmp_path: Path, smooth: Any) -> None:
    out = tmp_path / "out.csv"
    printed = smooth(path, "--ema", "0.9,0.99", "--ema", "0.5", "--sma", 7, "-o", out)
    was, got = read_columns(path.read_text()), read_columns(out.read_text())
    assert {name: got[name] for name in was} == was
    assert list(got)[len(was) :] == [
        f"{name}_{kind}"
        for name in ("loss", "val_loss", "size")
        for kind in ("sma", "ema_0.9", "ema_0.99", "ema_0.5")
    ]
    for name in ("loss", "val_loss", "size"):
        assert got[f"{name}_sma"] == average_column(SimpleMovingAverage(7), was[name])
        for decay in ("0.9", "0.99", "0.5"):
            average = ExponentialMovingAverage(float(decay))
            assert got[f"{name}_ema_{decay}"] == average_column(average, was[name])
    assert printed.out == ""
    said = printed.err.splitlines()
    assert said[0] == f"{path}: 200 rows, step 0 to 199"
    assert " ".join(said[1].split()) == "values last SMA 7 EMA 0.9 EMA 0.99 EMA 0.5"
    last = [float(got[name][-1]) for name in ("loss", "loss_sma", "loss_ema_0.9")]
    assert said[2].split()[:5] == ["loss", "200", *(f"{value:.5g}" for value in last)]
    assert said[-2:] == ["Left out, because not all values are numbers: note", f"Averages: {out}"]
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.csv", "out.csv"}
    printed = smooth(path, "--weights", "size", "--debias", "--metrics", "loss", "--quiet")
    assert printed.err == ""
    got = read_columns(printed.out)
    debiased = ExponentialMovingAverage(0.9, debias=True)
    assert got["loss_ema"] == average_column(debiased, was["loss"], was["size"])
    assert got["loss_sma"] == average_column(SimpleMovingAverage(20), was["loss"], was["size"])


def test_smoothed_columns_are_skipped_and_json_is_read(path: Path, smooth: Any) -> None:
    path.write_text("loss,loss_ema,loss_ema_0.5\n1,2,3\n2,3,4\n")
    assert list(read_columns(smooth(path).out))[3:] == ["loss_sma", "loss_ema_0.9"]
    said = smooth(path, "--metrics", "loss", "--ema", 0.5, code=2).err
    assert "has a column 'loss_ema_0.5' already" in said
    rows = [{"loss": 2.0, "step": 10}, {"eval_loss": 3.0, "step": 10}, {"loss": 1.0, "step": 20}]
    path.write_text(json.dumps({"log_history": rows}))
    printed = smooth(path, "--ema", 0.5)
    assert printed.out == "loss,step,eval_loss,loss_ema\n2.0,10,,2.0\n,10,3.0,\n1.0,20,,1.5\n"
    assert printed.err.startswith(f"{path}: 3 rows, step 10 to 20\n")


def test_standard_input_is_read_as_utf8(monkeypatch: pytest.MonkeyPatch, smooth: Any) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("step,µ\n0,1.0\n1,3.0\n".encode("utf-8-sig")), "ascii")
    monkeypatch.setattr("sys.stdin", stdin)
    assert smooth("-", "--sma", 2).out == "step,µ,µ_sma\n0,1.0,1.0\n1,3.0,2.0\n"


def test_plot_shows_the_selected_columns(
    path: Path, monkeypatch: pytest.MonkeyPatch, smooth: Any
) -> None:
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda n: None if "plot" in n else find(n))
        said = smooth(path, "--plot", path.with_suffix(".png"), code=2).err
    assert "--plot needs the matplotlib package: pip install matplotlib" in said
    require_packages("matplotlib")
    from fastema.tracking.plots import picture

    seen: list[Any] = []

    def draw(panels: Any, *, out: str, **options: Any) -> None:
        seen[:] = panels, options
        Path(out).write_text("a picture")

    monkeypatch.setattr(picture, "draw", draw)

    def capture(*arguments: object) -> Any:
        smooth(path, "--plot", path.with_suffix(".png"), *arguments)
        return seen

    (loss, val_loss, rate), options = capture("--ema", 0.9, "--metrics", "loss,val_loss,lr")
    was = read_columns(path.read_text())["loss"]
    raw, ema = loss.lines
    assert (loss.name, loss.axis, rate.name) == ("loss", "step", "lr")
    assert raw.curve.values.tolist() == list(map(float, was))
    want = average_column(ExponentialMovingAverage(0.9), was)
    assert ema.curve.values.tolist() == list(map(float, want))
    assert ema.curve.steps.tolist() == raw.curve.steps.tolist() == list(range(200))
    assert val_loss.lines[0].curve.steps.tolist() == list(range(19, 200, 20))
    assert options["log"] == "auto"
    _, options = capture("--metrics", "loss", "--log-scale=on")
    assert options["log"] is True


REFUSALS = {
    "none.csv": "none.csv: No such file or directory",
    "metrics.csv --metrics los": "no column 'los'; those with numbers are\n  - epoch",
    "metrics.csv --metrics note": "column 'note' holds no numbers: row 1 has 'a, b'",
    "metrics.csv --weights val_loss": "row 1 has a value of loss, but no weight in val_loss",
    "metrics.csv --weights weight": "no column 'weight'",
    "metrics.csv --step val_loss": "'val_loss' cannot count the steps",
    "metrics.csv --metrics size --weights size": "no metric besides the weights in size",
    "metrics.csv -o metrics.csv": "metrics.csv is the log itself",
    "metrics.csv -o a.png --plot a.png": "--out and --plot are the same file",
}
USAGE = {
    "--ema 1": "--ema: expected a number in [0, 1), got 1",
    "--sma 0": "--sma: expected a whole number of at least 1, got 0",
    "--plot a.txt": "--plot: expected a name ending in .png, .svg, .pdf, got a.txt",
    "-o nowhere/a.csv": "cannot write nowhere/a.csv: No such file or directory",
    "--bogus": "unrecognized arguments: --bogus",
    "--on-nonfinite hide": "invalid choice: 'hide'",
}


@pytest.mark.parametrize("line", [*REFUSALS, *USAGE])
def test_refusals_say_why_and_write_nothing(
    line: str, path: Path, monkeypatch: pytest.MonkeyPatch, smooth: Any
) -> None:
    monkeypatch.chdir(path.parent)
    usage = line in USAGE
    printed = smooth(*["metrics.csv"] * usage, *line.split(), code=2)
    assert printed.out == ""
    assert printed.err.startswith("usage: fastema smooth " if usage else "fastema smooth: ")
    assert (USAGE if usage else REFUSALS)[line] in printed.err
    assert os.listdir() == ["metrics.csv"]
    assert path.read_text() == make_log()


def test_failed_write_keeps_the_old_file_and_a_device_stays_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, smooth: Any
) -> None:
    from fastema.cli.smooth import averages

    def fail(file: io.TextIOBase, *_: object, **__: object) -> None:
        file.write("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(averages, "write", fail)
    out = path.with_name("out.csv")
    out.write_text("an older one")
    assert "out.csv exists; add --force to replace it" in smooth(path, "-o", out, code=2).err
    assert "No space left on device" in smooth(path, "-o", out, "--force", code=2).err
    assert out.read_text() == "an older one"
    assert len(list(path.parent.iterdir())) == 2
    monkeypatch.undo()
    path.with_name("null").symlink_to(os.devnull)
    smooth(path, "-o", path.with_name("null"))
    assert not Path(os.devnull).is_file()
