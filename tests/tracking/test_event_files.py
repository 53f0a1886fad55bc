"""Scalars come back out of event files of every writer, as TensorBoard would draw them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from fastema.errors import ArgumentError
from fastema.tracking.logs import Curve, read

from ..support.requirements import require_packages

NEEDS = ("tensorboard",)


# Protocol buffers warn of what they will not have in a later version.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Points = list[tuple[int, float]]


def write(
    folder: Path, tags: dict[str, Points], *, kind: str = "tensor", restart: int | None = None
) -> None:
    """One more event file in a folder, by the writer of the tensorboard package."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    number = len(list(folder.glob("*"))) if folder.exists() else 0
    writer = EventFileWriter(str(folder), filename_suffix=f".{number}")
    # Names are ordered by the second at which a file was made, and all of these have the same.
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
    """Equal as float32, which is what an event file holds."""
    found = list(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
    assert found == [(step, float(np.float32(value))) for step, value in points]


def points(count: int, seed: int, start: int = 0) -> Points:
    values = np.random.default_rng(seed).normal(size=count).tolist()
    return list(enumerate(values, start))


def test_tensors_that_are_no_scalars_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"text": points(3, 1)}, kind="text")
    with pytest.raises(ArgumentError, match="no scalars in the TensorBoard event files"):
        read(tmp_path)
    write(tmp_path, {"loss": points(3, 2)}, kind="scalars")
    assert set(read(tmp_path)) == {"step", "loss"}


def test_runs_in_folders_and_a_tag_called_step(tmp_path: Path) -> None:
    for seed, run in enumerate((".", "train", "deep/er")):
        write(tmp_path / run, {"loss": points(4, seed), "step": points(4, seed)}, kind="scalars")
    curves = read(tmp_path)
    for seed, prefix in enumerate(("", "train/", "deep/er/")):
        assert_points(curves[f"{prefix}loss"], points(4, seed))
    assert set(read(tmp_path / "train")) == {"global_step", "loss", "step"}


def test_a_run_that_started_again_from_an_earlier_step(tmp_path: Path) -> None:
    first, second = points(8, 1), points(5, 2, start=5)
    write(tmp_path, {"loss": first, "acc": first}, kind="simple")
    write(tmp_path, {"loss": second}, kind="simple", restart=5)
    curves = read(tmp_path)
    assert_points(curves["loss"], [*first[:5], *second])
    assert_points(curves["acc"], first[:5])


def test_a_file_that_was_cut_short_or_is_damaged(tmp_path: Path) -> None:
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


def test_folders_without_event_files(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no TensorBoard event file in this folder$"):
        read(tmp_path)
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ArgumentError, match=r"did you mean\n  - .*version_0.metrics.csv"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "events.out.tfevents.1")


def test_torch_writes_what_is_read(tmp_path: Path) -> None:
    require_packages("torch")
    from torch.utils.tensorboard import SummaryWriter

    its = points(20, 1)
    for new_style in (False, True):
        folder = tmp_path / str(new_style)
        with SummaryWriter(str(folder)) as writer:
            for step, value in its:
                writer.add_scalar("loss", value, step, new_style=new_style)
        assert_points(read(folder)["loss"], its)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path, {"loss": points(3, 1)})
    monkeypatch.setitem(sys.modules, "tensorboard.util.tensor_util", None)
    with pytest.raises(ArgumentError, match="pip install tensorboard"):
        read(tmp_path)
