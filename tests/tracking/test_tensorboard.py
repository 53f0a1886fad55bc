"""Event files of TensorBoardWriter, read by TensorBoard's own reader."""

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.util.tensor_util import make_ndarray

from fastema.errors import ArgumentError, BridgeError, CheckpointError, StateError
from fastema.tracking import TensorBoardWriter, logs
from fastema.tracking.lazy_float import LazyFloat

from ..support.requirements import require_packages
from ..support.smoothing import assert_close, ema, sma

WINDOW, DECAY = 4, 0.8


def draw(count: int, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    return (np.exp(-np.arange(count) / 30) + rng.normal(size=count) / 5 + 1).tolist()


class Points(NamedTuple):
    steps: list[int]
    values: list[float]
    times: list[float]


def read(folder: Path, run: str, tag: str = "loss") -> Points:
    """Read all points of a tag in order."""
    found = EventAccumulator(str(folder / run), {"tensors": 0}).Reload()
    events = found.Tensors(tag) if tag in found.Tags()["tensors"] else []
    values = [make_ndarray(event.tensor_proto).item() for event in events]
    return Points([event.step for event in events], values, [event.wall_time for event in events])


def assert_rounded(got: Any, want: np.ndarray) -> None:
    """Assert equality up to rounding to float32, as event files store it."""
    np.testing.assert_allclose(got, want, rtol=np.finfo(np.float32).eps / 2 * 1.001)


def test_raw_sma_and_ema_are_runs_that_share_their_tags(tmp_path: Path) -> None:
    losses, rates, sizes = draw(50), draw(50, 1), np.random.default_rng(2).integers(1, 9, 50)
    before, returned = time.time(), []
    with TensorBoardWriter(tmp_path / "first", WINDOW, DECAY) as writer:
        for k, (loss, rate, size) in enumerate(zip(losses, rates, sizes, strict=True)):
            now = writer.add_scalars({"train/loss": loss, "rate_x": rate}, 10 * k, weight=size)
            assert now["train/loss_raw"] == loss
            returned.append(now)
        assert writer.averages == returned[-1]
    # Event files hold float32, but calls return double precision.
    assert_close([now["train/loss_sma"] for now in returned], sma(losses, WINDOW, sizes))
    assert_close([now["train/loss_ema"] for now in returned], ema(losses, DECAY, sizes))
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload().Runs()
    assert set(runs) == {"first/raw", "first/sma", "first/ema"}
    names = {f"{tag}_{run}" for tag in ("train/loss", "rate_x") for run in ("raw", "sma", "ema")}
    assert set(logs.read(tmp_path / "first")) == {"step", *names}
    for tag, series in (("train/loss", losses), ("rate_x", rates)):
        averages = sma(series, WINDOW, sizes), ema(series, DECAY, sizes)
        for run, curve in zip(("raw", "sma", "ema"), (np.array(series), *averages), strict=True):
            points = read(tmp_path / "first", run, tag)
            assert points.steps == list(range(0, 500, 10))
            assert before - 1 <= points.times[0] <= points.times[-1] <= time.time()
            assert_rounded(points.values, curve)


def test_device_values_are_read_only_when_written(tmp_path: Path) -> None:
    require_packages("torch")
    import torch

    asked: list[Any] = []

    class OnDevice(torch.Tensor):
        """A tensor that claims to be on a GPU and records its reads."""

        device = property(lambda self: torch.device("cuda"))
        is_cuda = property(lambda self: True)

        def item(self) -> Any:
            asked.append(self)
            return super().item()

        __float__ = item

    losses = draw(10)
    with TensorBoardWriter(tmp_path, WINDOW, DECAY) as writer:
        for loss in losses:
            writer.add_scalar("loss", torch.tensor(loss, dtype=torch.float64).as_subclass(OnDevice))
        assert not asked
    assert asked
    assert_rounded(read(tmp_path, "sma").values, sma(losses, WINDOW))
    assert_rounded(read(tmp_path, "ema").values, ema(losses, DECAY))


def test_resumed_run_writes_the_same_curves(tmp_path: Path) -> None:
    losses = draw(40)
    with TensorBoardWriter(tmp_path / "bare", None, DECAY, raw=False, debias=True) as writer:
        for loss in losses:
            writer.add_scalar("loss", loss)
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["ema"]
    assert_rounded(read(tmp_path / "bare", "ema").values, ema(losses, DECAY, debias=True))
    with TensorBoardWriter(tmp_path / "whole", WINDOW, DECAY) as writer:
        want = [writer.add_scalar("loss", loss) for loss in losses]
    with TensorBoardWriter(tmp_path / "parts", WINDOW, DECAY) as writer:
        for loss in losses[:17]:
            writer.add_scalar("loss", loss)
        state = json.loads(json.dumps(writer.state_dict()))
    with TensorBoardWriter(tmp_path / "parts", WINDOW, DECAY) as writer:
        writer.load_state_dict(state)
        got = [writer.add_scalar("loss", loss) for loss in losses[17:]]
    assert got == want[17:]
    for run in ("raw", "sma", "ema"):
        whole, parts = read(tmp_path / "whole", run), read(tmp_path / "parts", run)
        # TensorBoard sorts files of one second by name: file 10 before file 9.
        found = sorted(zip(parts.steps, parts.values, strict=True))
        assert found == list(zip(whole.steps, whole.values, strict=True))
    with TensorBoardWriter(tmp_path / "other", WINDOW + 1) as other:
        for wrong in (state, {}):
            with pytest.raises(CheckpointError):
                other.load_state_dict(wrong)
        assert other.add_scalar("loss", 5.0)["loss_sma"] == 5.0
    assert read(tmp_path / "other", "raw").steps == [0]


def test_points_are_written_when_many_or_overdue_and_an_unreadable_one_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    writer = TensorBoardWriter(tmp_path, flush_secs=10.0, max_queue=12)
    written = []
    for later in (0.0, 0.0, 0.0, 0.0, 9.0, 1.0, 0.0):
        clock[0] += later
        writer.add_scalar("loss", 1.5)  # three points
        written.append(len(read(tmp_path, "raw").steps))
    assert written == [0, 0, 0, 4, 4, 6, 6]
    for x in (LazyFloat(lambda: 1 / 0), 3.0):
        writer.add_scalar("loss", x)
    with pytest.raises(ZeroDivisionError):
        writer.close()
    assert read(tmp_path, "sma").steps == [*range(7), 8]


def test_wrong_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TensorBoardWriter(tmp_path)
    for options in ({"step": 1.5}, {"weight": -1.0}, {"tag": ""}, {"tag": 3}):
        with pytest.raises(ArgumentError):
            writer.add_scalar(**{"tag": "loss", "value": 2.0, **options})
    with pytest.raises(BridgeError):
        writer.add_scalar("loss", "much")
    assert writer.add_scalar("loss", 1.5)["loss_ema"] == 1.5
    writer.close()
    writer.close()
    for call in (lambda: writer.add_scalar("loss", 1.0), writer.flush):
        with pytest.raises(StateError, match="closed: make another"):
            call()
    assert read(tmp_path, "raw")[:2] == ([0], [1.5])
    for options in ({"flush_secs": -1}, {"max_queue": 0}, {"window_size": 0}, {"decay": 1.0}):
        with pytest.raises(ArgumentError):
            TensorBoardWriter(tmp_path / "never", **options)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(ArgumentError, match=r"pip install fastema\[tracking\]"):
        TensorBoardWriter(tmp_path / "never")
    assert not (tmp_path / "never").exists()
