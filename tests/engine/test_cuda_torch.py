"""PyTorch devices under CUDA launches: captures on other devices, and forked processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import fastema
from fastema.bridges.torch_cuda import TorchContext
from fastema.engine import cuda as engine
from fastema.engine.cubins import Key
from fastema.errors import DeviceError, StateError

from ..support.stub_gpu import StubGpu, gpu

__all__ = ["gpu"]


def test_capture_on_a_device_not_current_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reports the current device: the graph would be empty and the work run now."""
    current, captured = [0], set[int]()

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        try:
            yield
        finally:
            current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] in captured)
    for current[0] in (0, 1):
        here, other = TorchContext(current[0]), TorchContext(1 - current[0])
        captured.clear()
        assert not here.capturing()
        assert not other.capturing()
        captured.add(1 - current[0])
        assert not here.capturing()
        assert other.capturing()
        captured.add(current[0])
        assert here.capturing()
        assert other.capturing()
        captured.remove(1 - current[0])
        with pytest.raises(StateError, match=f"cuda:{1 - current[0]}"):
            other.capturing()
        assert here.capturing()


def test_a_forked_process_is_refused_the_gpu_but_averages_on_the_cpu(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the parent may hold the compiler's lock, which the child could never acquire."""
    ema, found = fastema.EMA([torch.randn(5)], 0.5), engine.device(0)
    monkeypatch.setattr(engine, "_forked", False)
    engine._after_fork()
    monkeypatch.setattr(engine, "cubin", lambda key: pytest.fail("compiled"))
    for call in (ema.update, lambda: found.function(Key("add", ("f32", "f32"), "flat", (9, 0)))):
        with pytest.raises(DeviceError, match="'spawn'"):
            call()
    gpu.place = lambda tensor: None
    weights = [torch.zeros(5)]
    ema = fastema.EMA(weights, 0.5)
    weights[0] += 1
    ema.update()
    assert ema.shadow["0"].tolist() == [0.5] * 5
