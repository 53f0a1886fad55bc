"""The host's side of CUDA launches, against a driver that records what it is asked for."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.engine import cuda as engine
from fastema.engine import cuda_group
from fastema.engine.cubins import Unavailable
from fastema.errors import ArgumentError, DeviceError, StateError
from fastema.rules import inverse_gamma, power, warmup

from ..support.stub_gpu import StubGpu, gpu

__all__ = ["gpu"]

DTYPES = (torch.float32, torch.bfloat16)


class Model(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        shapes = [(37, 11), (5,), (0,), (), (64, 33), (1000,)]
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes
        )
        self.register_buffer("count", torch.tensor(3))


def step(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9).add_(torch.randn(parameter.shape).to(parameter.dtype))


def shadow(average: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in average.shadow.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Large(Model):
    """With tensors of several rows, on both devices."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__(dtype, seed)
        self.weights.append(torch.nn.Parameter(torch.randn(70_001).to(dtype)))
        self.weights.append(torch.nn.Parameter(torch.randn(40_000).to(dtype)[::2]))


def on_cpu_too(
    stub: StubGpu,
    make: Any,
    steps: int = 12,
    dtype: torch.dtype = torch.float32,
    kind: type[Model] = Model,
) -> Any:
    """The same run on the stub and on the CPU."""
    found = []
    for on_gpu in (True, False):
        stub.place = lambda tensor, on_gpu=on_gpu: 0 if on_gpu else None
        model = kind(dtype)
        average = make(model, on_gpu)
        torch.manual_seed(9)
        for _ in range(steps):
            step(model)
            average.update()
        found.append((shadow(average), average.num_updates))
    stub.place = lambda tensor: 0
    assert found[0][1] == found[1][1]
    return found[0][0], found[1][0]


@pytest.mark.each_value
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shadow_dtype": "float32", "decay": warmup(0.9)},
        pytest.param({"rounding": "nearest", "update_every": 3}, marks=pytest.mark.slow),
        {"start_after": 4, "update_every": 2, "decay": inverse_gamma(0.99, power=0.7)},
        pytest.param({"zero_debias": True, "drift": True}, marks=pytest.mark.slow),
        {"shadow_dtype": "bfloat16", "seed": 7},
    ],
    ids=str,
)
def test_an_update_is_the_cpu_update(
    gpu: StubGpu, dtype: torch.dtype, capturable: bool, options: dict[str, Any]
) -> None:
    def make(model: Model, on_gpu: bool) -> fastema.EMA:
        return fastema.EMA(model, **options, capturable=capturable and on_gpu)

    assert_same(*on_cpu_too(gpu, make, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("options", [{}, {"start_after": 3, "update_every": 2}], ids=str)
def test_a_windowed_mean_is_that_of_the_cpu(
    gpu: StubGpu, capturable: bool, options: dict[str, Any]
) -> None:
    def make(model: Model, on_gpu: bool) -> fastema.SMA:
        return fastema.SMA(model, window=4, capturable=capturable and on_gpu, **options)

    assert_same(*on_cpu_too(gpu, make, kind=Large))


@pytest.mark.slow
def test_large_and_spaced_tensors(gpu: StubGpu) -> None:
    """Their random bits are those of the CPU, however the two divide them."""

    def make(model: Model, on_gpu: bool) -> fastema.EMA:
        return fastema.EMA(model, warmup(0.9), shadow_dtype="bfloat16")

    assert_same(*on_cpu_too(gpu, make, kind=Large, steps=4))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("count", [3, 8, 11])
def test_several_averages(gpu: StubGpu, capturable: bool, count: int) -> None:
    rules = [power(0.02 + 0.02 * k) if k % 2 else 1 - 0.5**k for k in range(count)]
    models = [Model(), Model()]
    gpu.place = lambda tensor: 0
    if capturable and count > 8:
        with pytest.raises(ArgumentError, match="up to 8 averages"):
            fastema.EMA(models[0], rules, capturable=True)
        return
    there = fastema.EMA(models[0], rules, capturable=capturable)
    gpu.place = lambda tensor: None
    here = fastema.EMA(models[1], rules)
    for average, model in ((there, models[0]), (here, models[1])):
        torch.manual_seed(2)
        gpu.place = lambda tensor, average=average: 0 if average is there else None
        for _ in range(7):
            step(model)
            average.update()
    for one, other in zip(there.shadows, here.shadows, strict=True):
        assert_same(dict(one), dict(other))


def test_one_launch_per_group_and_nothing_else(gpu: StubGpu) -> None:
    """Per update: one launch for the weights, one for the buffers; no upload, no wait."""
    model = Model()
    ema = fastema.EMA(model)
    ema.update()
    gpu.driver.take()
    gpu.driver.calls.clear()
    gpu.context.calls.clear()
    for _ in range(5):
        step(model)
        ema.update()
    assert [name for name, _, _ in gpu.driver.take()] == ["lerp", "copy"] * 5
    assert gpu.driver.calls == {"cuLaunchKernel": 10, "cuCtxGetCurrent": 10}
    assert not gpu.context.calls


def test_a_thousand_tensors_are_one_launch(gpu: StubGpu) -> None:
    tensors = [torch.randn(1 + k % 300) for k in range(1000)]
    ema = fastema.EMA(tensors)
    ema.update()
    gpu.driver.take()
    ema.update()
    ((name, blocks, _),) = gpu.driver.take()
    assert (name, blocks) == ("lerp", 1000)


def test_a_capturable_update_is_a_tick_and_the_same_launches(gpu: StubGpu) -> None:
    ema = fastema.EMA(Model(), capturable=True)
    gpu.driver.take()
    gpu.context.calls.clear()
    ema.update()
    assert [name for name, _, _ in gpu.driver.take()] == ["advance", "lerp", "copy"]
    assert not gpu.context.calls


def test_the_current_stream_is_used(gpu: StubGpu) -> None:
    model = Model()
    ema = fastema.EMA(model)
    for handle in (5, 6, 5):
        gpu.context.handle = handle
        gpu.driver.take()
        ema.update()
        assert {stream for _, _, stream in gpu.driver.take()} == {handle}


def test_memory_is_held_once_per_stream(gpu: StubGpu) -> None:
    model = Model()
    ema = fastema.EMA(model)
    gpu.context.held.clear()
    gpu.context.handle = 5
    ema.update()
    held = {tensor.data_ptr() for tensor in gpu.context.held if isinstance(tensor, torch.Tensor)}
    assert held >= {p.data_ptr() for p in model.parameters()}
    assert held >= {tensor.data_ptr() for tensor in ema.shadow.values()}
    assert any(isinstance(owner, np.ndarray) for owner in gpu.context.held)  # the table
    gpu.context.calls.clear()
    ema.update()
    assert not gpu.context.calls


def test_two_devices_in_one_model(gpu: StubGpu) -> None:
    model = Model()
    second = {p.data_ptr() for p in list(model.parameters())[3:]}
    gpu.place = lambda tensor: int(tensor.data_ptr() in second)
    # The average of a tensor lies where the tensor does, which the stub cannot tell by its address.
    weights = list(model.parameters())
    averages = [p.detach().clone() for p in weights]
    second |= {a.data_ptr() for a in averages[3:]}
    gpu.contexts[1].handle = 78
    plan = fastema.Plan(averages, weights)
    before = [a.clone() for a in averages]
    gpu.driver.take()
    step(model)
    plan.lerp_(0.25)
    assert sorted(stream for _, _, stream in gpu.driver.take()) == [77, 78]
    assert gpu.driver.calls["cuCtxPushCurrent"] == gpu.driver.calls["cuCtxPopCurrent"] > 0
    assert gpu.driver.current == [1000]
    for average, start, weight in zip(averages, before, weights, strict=True):
        torch.testing.assert_close(average, start.lerp(weight.detach(), 0.25))


def test_a_thread_without_a_context(gpu: StubGpu) -> None:
    ema = fastema.EMA(Model())
    gpu.driver.current = [0]
    thread = threading.Thread(target=ema.update)
    thread.start()
    thread.join()
    assert ema.num_updates == 1
    assert gpu.driver.current == [0]


@pytest.mark.slow
def test_swap_and_restore(gpu: StubGpu) -> None:
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"shadow_dtype": "float32"})):
        model = Model(dtype)
        ema = fastema.EMA(model, 0.5, **options)
        step(model)
        ema.update()
        raw, average = {n: p.clone() for n, p in model.state_dict().items()}, shadow(ema)
        with ema.swapped():
            for name, tensor in model.state_dict().items():
                near = average[name].to(tensor.dtype)  # of two equally near, either
                torch.testing.assert_close(tensor, near, rtol=2**-7, atol=0)
        assert_same(raw, dict(model.state_dict()))
        assert_same(average, shadow(ema))


def test_the_host_may_run_ahead(gpu: StubGpu) -> None:
    """Parameters are read at the launch; nothing on the host is needed when the device is late."""
    model = Model()
    ema = fastema.EMA(model, warmup(0.9))
    twin_model = Model()
    gpu.place = lambda tensor: None
    reference = fastema.EMA(twin_model, warmup(0.9))
    for _ in range(6):
        reference.update()
    gpu.place = lambda tensor: 0
    gpu.driver.pending = []
    for _ in range(6):
        ema.update()
    gpu.driver.finish()
    gpu.driver.pending = None
    assert_same(shadow(ema), shadow(reference))


@pytest.mark.parametrize(
    "options",
    [
        {"decay": warmup(0.999), "rounding": "stochastic"},
        {"decay": (0.9, power(0.1)), "update_every": 2, "start_after": 5},
    ],
    ids=str,
)
def test_replays_follow_the_schedule(gpu: StubGpu, options: dict[str, Any]) -> None:
    """What a graph does: the launches of one update, again and again, without the host."""
    model, other = Model(torch.bfloat16), Model(torch.bfloat16)
    ema = fastema.EMA(model, **options, capturable=True)
    gpu.place = lambda tensor: None
    eager = fastema.EMA(other, **options)
    gpu.place = lambda tensor: 0
    ema.update()
    gpu.driver.pending = []
    gpu.context.captured = True
    ema.update()
    graph, gpu.driver.pending = gpu.driver.pending, None
    gpu.context.captured = False
    torch.manual_seed(4)
    for _ in range(300):
        step(model)
        for launch in graph:
            launch()
    gpu.place = lambda tensor: None
    torch.manual_seed(4)
    eager.update()
    for _ in range(300):
        step(other)
        eager.update()
    gpu.place = lambda tensor: 0
    assert ema.num_updates == eager.num_updates == 301
    for one, two in zip(ema.shadows, eager.shadows, strict=True):
        assert_same(dict(one), dict(two))


def test_a_capture_needs_a_capturable_average(gpu: StubGpu) -> None:
    ema = fastema.EMA(Model())
    before = shadow(ema)
    gpu.context.captured = True
    with pytest.raises(StateError, match="capturable=True"):
        ema.update()
    gpu.context.captured = False
    assert ema.num_updates == 0
    assert_same(before, shadow(ema))


def test_what_was_not_prepared_is_refused_in_a_capture(gpu: StubGpu) -> None:
    avg, x = [torch.randn(5)], [torch.randn(5)]
    plan = fastema.Plan(avg, x)
    gpu.context.captured = True
    with pytest.raises(StateError, match="once before capturing"):
        plan.lerp_(0.5)
    gpu.context.captured = False
    plan.lerp_(0.5)
    gpu.context.captured = True
    plan.lerp_(0.5)


def test_random_bits_of_a_plan_are_not_captured(gpu: StubGpu) -> None:
    plan = fastema.Plan([torch.randn(5).bfloat16()], [torch.randn(5)], rounding="stochastic")
    plan.lerp_(0.5)
    gpu.context.captured = True
    with pytest.raises(StateError, match="capturable"):
        plan.lerp_(0.5)


def test_a_capturable_average_is_saved_and_loaded(gpu: StubGpu) -> None:
    model = Model()
    ema = fastema.EMA(model, warmup(0.99), capturable=True)
    for _ in range(5):
        step(model)
        ema.update()
    state = ema.state_dict()
    assert state["num_updates"] == 5
    twin_model = Model()
    twin_model.load_state_dict(model.state_dict())
    resumed = fastema.EMA(twin_model, warmup(0.99), capturable=True)
    resumed.load_state_dict(state)
    for average in (ema, resumed):
        torch.manual_seed(1)
        for _ in range(4):
            step(average._own_model)
            average.update()
    assert resumed.num_updates == 9
    assert_same(shadow(ema), shadow(resumed))


def test_capturable_is_for_gpus(gpu: StubGpu) -> None:
    gpu.place = lambda tensor: None
    with pytest.raises(ArgumentError, match="some are on cpu"):
        fastema.EMA(Model(), capturable=True)
    with pytest.raises(ArgumentError, match="on_nonfinite='skip'"):
        fastema.EMA(Model(), capturable=True, on_nonfinite="skip")


def test_guard_and_drift(gpu: StubGpu) -> None:
    model = Model()
    ema = fastema.EMA(model, 0.9, on_nonfinite="skip", drift=True)
    step(model)
    ema.update()
    expected = sum(
        float((p.detach().double() - ema.shadow[name].double()).square().sum())
        for name, p in model.named_parameters()
    )
    assert ema.drift.distance == pytest.approx(expected**0.5, rel=1e-4)
    before = shadow(ema)
    with torch.no_grad():
        model.weights[0][3, 3] = torch.nan
    ema.update()
    assert ema.num_skipped == 1
    assert_same(before, shadow(ema))


def test_a_failed_launch_names_the_error(gpu: StubGpu) -> None:
    ema = fastema.EMA(Model())
    gpu.driver.refused = 1
    with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED"):
        ema.update()
    assert ema.num_updates == 0
    ema.update()
    assert ema.num_updates == 1


def test_after_a_fork(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    ema = fastema.EMA(Model())
    monkeypatch.setattr(engine, "_forked", False)
    engine._after_fork()
    with pytest.raises(DeviceError, match="'spawn'"):
        ema.update()


def test_a_fork_before_any_gpu_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_devices", {})
    monkeypatch.setattr(engine, "_forked", False)
    engine._after_fork()
    assert not engine._forked


def test_without_kernels_torch_does_it_and_says_so(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(key: Any) -> None:
        raise Unavailable("numba-cuda is missing: pip install 'fastema[cuda]'")

    monkeypatch.setattr(engine, "cubin", none)
    model = Model()
    with pytest.warns(cuda_group.SlowWarning, match=r"fastema\[cuda\].*cuda:0.*slower"):
        ema = fastema.EMA(model, 0.75)
    start = shadow(ema)
    step(model)
    ema.update()  # it is said once
    ema.update()
    for name, parameter in model.named_parameters():
        want = start[name].lerp(parameter.detach(), 0.25).lerp(parameter.detach(), 0.25)
        torch.testing.assert_close(ema.shadow[name], want)
    with pytest.raises(DeviceError, match=r"fastema\[cuda\]"):
        fastema.EMA(Model(), capturable=True)


def test_a_driver_that_refuses_the_code(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = SimpleNamespace(name="CUDA_ERROR_NO_BINARY_FOR_GPU")
    monkeypatch.setattr(gpu.driver, "cuModuleLoadData", lambda code: (refused, None))
    with pytest.warns(cuda_group.SlowWarning, match="NO_BINARY_FOR_GPU.*580"):
        fastema.lerp_([torch.zeros(3)], [torch.ones(3)], 0.5)


def test_torch_without_cuda_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("torch has CUDA here")
    ema = fastema.EMA(torch.nn.Linear(2, 2))
    with pytest.raises(DeviceError, match="cannot move a tensor to cuda"):
        ema.to("cuda")
    ema.update()


def test_an_average_moves_between_devices(gpu: StubGpu) -> None:
    model = Model()
    ema = fastema.EMA(model, 0.5)
    step(model)
    ema.update()
    before = shadow(ema)
    gpu.place = lambda tensor: None  # the model was moved; the average still is on the GPU
    there = {t.untyped_storage().data_ptr() for t in ema.shadow.values()}
    gpu.place = lambda tensor: 0 if tensor.untyped_storage().data_ptr() in there else None
    ema.to("cpu")
    assert_same(before, shadow(ema))
    gpu.driver.take()
    ema.update()
    assert not gpu.driver.take()


def test_snapshots_of_an_average_on_a_gpu(gpu: StubGpu, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = Model()
    ema = fastema.PowerEMA(model)
    for _ in range(3):
        step(model)
        ema.update()
    paths = fastema.posthoc.save_snapshot(ema, tmp_path)
    for path, average in zip(paths, ema.shadows, strict=True):
        assert_same(load_file(path), dict(average))


def test_a_ring_in_the_memory_of_the_host(gpu: StubGpu) -> None:
    def make(model: Model, on_gpu: bool) -> fastema.SMA:
        average = fastema.SMA(model, window=3, ring_device="cpu")
        if on_gpu:
            ((_, entry),) = [one for one in average._store if one[1].name == "weights.0"]
            ring, shadow = entry.parts["ring"][1], entry.parts["shadow"][1]
            assert (ring.device, shadow.device) == ("cpu", "cuda:0")
        return average

    assert_same(*on_cpu_too(gpu, make))


def test_the_host_waits_before_it_reads_the_ring(gpu: StubGpu) -> None:
    model = Model()
    sma = fastema.SMA(model, window=3, ring_device="cpu")
    gpu.driver.pending = []
    for _ in range(5):
        step(model)
        sma.update()
        gpu.driver.finish()
    sma.update()
    assert gpu.driver.pending
    state = sma.state_dict()
    assert gpu.context.calls["wait"]
    latest = state["ring"][0]["weights.0"][5 % 3]
    assert torch.equal(latest, model.weights[0].detach())
    gpu.driver.finish()
    gpu.driver.pending = None
    other = fastema.SMA(model, window=3, ring_device="cpu")
    other.load_state_dict(state)
    sma.update()
    other.update()
    assert_same(shadow(sma), shadow(other))
    gpu.context.calls.clear()
    del other, sma
    gc.collect()
    assert gpu.context.calls["wait"] >= 2  # nobody else knows that the device works on that memory


def test_a_ring_that_is_on_the_host_stays_there(gpu: StubGpu) -> None:
    model = Model()
    sma = fastema.SMA(model, window=3, ring_device="cpu")
    for _ in range(4):
        step(model)
        sma.update()
    before = shadow(sma)
    sma.to("cuda:0")
    assert sma._store.on_host
    assert_same(before, shadow(sma))
    with pytest.raises(ArgumentError, match="ring_device='cuda:1'"):
        fastema.SMA(model, ring_device="cuda:1")
