"""PyTorch on a fake CUDA driver: memory of others, pinned memory, and waits beside captures."""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastema.bridges import torch as bridge
from fastema.bridges import torch_cuda, torch_link

pytestmark = pytest.mark.torch


def test_pinned_memory_is_on_the_host_whatever_the_default_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zeros, asked = torch.zeros, []

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return zeros(*args, **options)  # there is no GPU to pin memory for

    monkeypatch.setattr(torch, "zeros", unpinned)
    with torch.device("meta"):
        flat = bridge.zeros(7, "bf16", "pinned")
    assert (flat.device.type, flat.dtype, asked) == ("cpu", torch.bfloat16, [True])
    assert not flat.any()


class CudaTensor:
    """A tensor on a GPU, whose memory is of torch's allocator or of another package."""

    is_cuda = True

    def __init__(self, *, owned: bool = True) -> None:
        self.recorded: list[Any] = []
        self._storage = SimpleNamespace(_cdata=int(owned))

    def detach(self) -> Any:
        return self

    def untyped_storage(self) -> Any:
        return self._storage

    def record_stream(self, stream: Any) -> None:
        self.recorded.append(stream)


class Sharded:
    """A DTensor: its own `record_stream` has no sharding strategy."""

    is_cuda = True

    def __init__(self, part: CudaTensor) -> None:
        self._local_tensor = part

    def detach(self) -> Any:
        raise NotImplementedError("no sharding strategy is registered")


@pytest.mark.parametrize(
    ("owners", "everything"),
    [
        ([CudaTensor()], True),
        ([CudaTensor(), CudaTensor(owned=False)], False),
        ([Sharded(CudaTensor())], True),
        ([Sharded(CudaTensor(owned=False))], False),
        ([torch.zeros(3), CudaTensor()], False),
    ],
    ids=["torch", "another package", "sharded", "sharded, another package", "host"],
)
def test_memory_that_torch_does_not_own_must_be_waited_for(
    owners: list[Any], everything: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: f"stream of {index}")
    monkeypatch.setattr(torch_cuda, "_is_owned", bool)
    monkeypatch.setattr(
        "fastema.bridges.torch_parts.is_divided", lambda tensor: isinstance(tensor, Sharded)
    )
    assert torch_cuda.TorchContext(1).defer_reuse(owners) is everything
    for one in owners:
        part = getattr(one, "_local_tensor", one)
        if isinstance(part, CudaTensor) and part.untyped_storage()._cdata:
            assert part.recorded == ["stream of 1"]


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the capture mode of this thread, which a fake driver exchanges; 0 is global."""
    current = [0]

    def exchange(reference: Any) -> int:
        value = reference._obj
        assert isinstance(value, ctypes.c_int)
        current[0], value.value = value.value, current[0]
        return 0

    monkeypatch.setattr(torch_cuda, "_exchange_capture_mode", lambda: exchange)
    return current


@pytest.mark.parametrize("failing", [False, True])
def test_the_offload_worker_does_not_invalidate_a_capture(mode: list[int], failing: bool) -> None:
    waited = []

    def synchronize() -> None:
        waited.append(mode[0])
        if failing:
            raise RuntimeError("the device failed")

    events = [(torch.device("cuda:0"), SimpleNamespace(synchronize=synchronize))] * 2
    fetch = torch_link.Fetch([], events, None)
    if failing:
        with pytest.raises(RuntimeError, match="the device failed"):
            fetch.complete()
    else:
        fetch.complete()
    assert waited == [2] * (1 if failing else 2)
    assert mode == [0]


def test_waits_work_where_there_is_no_nvidia_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Callable[..., Any]:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    torch_cuda._exchange_capture_mode.cache_clear()
    try:
        with torch_cuda.allow_captures():
            pass
    finally:
        torch_cuda._exchange_capture_mode.cache_clear()
