"""Averages on the host of a model on a GPU: the same bits, and no weights of two steps."""

import threading
from concurrent.futures import wait
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.bridges.torch_link import Fetch

pytestmark = [pytest.mark.gpu, pytest.mark.torch]


def build(device: torch.device, width: int = 64, **options: Any) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)).to(device, **options)


def train(model: nn.Module, ema: Any, steps: int) -> None:
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5, foreach=True)
    ema.follow(optimizer)
    for n in range(steps):
        for number, one in enumerate(parameters):
            one.grad = torch.full_like(one, (n * 7 + number) % 5 - 1.75)
        optimizer.step()
    ema.unfollow()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_average_equals_the_cpu(device: torch.device, dtype: torch.dtype) -> None:
    found, wanted = build(device, dtype=dtype), build(torch.device("cpu"), dtype=dtype)
    options = {"decay": 0.9, "shadow_dtype": "float32"}
    offloaded = fastema.EMA(found, offload=True, **options)
    reference = fastema.EMA(wanted, **options)
    train(found, offloaded, 20)
    train(wanted, reference, 20)
    for name, one in reference.shadow.items():
        assert torch.equal(offloaded.shadow[name], one), name
    raw = {name: one.clone() for name, one in found.state_dict().items()}
    with reference.swapped(), offloaded.swapped():
        for name, one in wanted.state_dict().items():
            assert torch.equal(found.state_dict()[name].cpu(), one), name
    for name, one in found.state_dict().items():
        assert torch.equal(one, raw[name]), name


def test_a_step_waits_on_the_device_until_the_weights_are_copied(gpu: torch.device) -> None:
    """The copy is delayed on its stream; the step queued behind it must not overtake it."""
    model = build(gpu, 2048)
    ema = fastema.EMA(model, decay=0.0, offload=True)
    (stream,) = ema._link._streams.values()
    weight = model[0].weight
    for value in (1.0, 2.0, 3.0):
        weight.data.fill_(value)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(300_000_000)
        ema.update()
        optimizer = torch.optim.SGD([weight], lr=1.0)
        weight.grad = torch.full_like(weight, 1e3)
        optimizer.step()
        assert bool((ema.shadow["0.weight"] == value).all()), value


def test_buffers_written_by_the_next_forward_pass_are_averaged_before(gpu: torch.device) -> None:
    """The copy of the weights is delayed; the next forward pass does not wait for it."""
    model = build(gpu)
    ema = fastema.EMA(model, decay=0.0, buffers="average", offload=True)
    (stream,) = ema._link._streams.values()
    for _ in range(3):
        before = {name: one.clone() for name, one in model.named_buffers()}
        with torch.cuda.stream(stream):
            torch.cuda._sleep(300_000_000)
        ema.update()
        model(torch.randn(8, 64, device=gpu))
        for name, one in before.items():
            assert torch.equal(ema.shadow[name], one.cpu()), name


def test_offloading_allocates_no_device_memory(gpu: torch.device) -> None:
    model = build(gpu, 2048)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    ema = fastema.EMA(model, decay=0.9, offload=True, shadow_dtype="float64")
    for _ in range(3):
        ema.update()
    with ema.swapped():
        pass
    ema.state_dict()
    assert torch.cuda.max_memory_allocated(gpu) - before < 1 << 16


def test_a_graph_is_captured_while_the_worker_waits_for_its_copy(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the default mode of a capture, another thread's wait for the device would end it."""
    model = build(gpu, 512)
    ema = fastema.EMA(model, decay=0.0, offload=True)
    begun, complete = threading.Event(), Fetch.complete

    def complete_in_a_capture(fetch: Fetch) -> None:
        assert begun.wait(30)
        complete(fetch)

    x, graph = torch.zeros(100, device=gpu), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    monkeypatch.setattr(Fetch, "complete", complete_in_a_capture)
    ema.update()
    with torch.cuda.graph(graph):
        begun.set()
        wait([ema._job], 30)
        x.add_(1)
    for _ in range(3):
        graph.replay()
    assert bool((x == 3).all())
    assert torch.equal(ema.shadow["0.weight"], model[0].weight.detach().cpu())
