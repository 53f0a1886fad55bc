"""The host side of CUDA launches, against a driver that records its calls."""

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NoReturn

import pytest
import torch

import fastema
from fastema.engine import cuda as engine
from fastema.engine import cuda_group
from fastema.engine.driver import DriverError
from fastema.errors import ArgumentError, DeviceError, StateError
from fastema.rules import inverse_gamma, power, warmup

from ..support.stub_gpu import StubGpu, assert_equal, change_weights, gpu, raise_unavailable, shadow

__all__ = ["gpu"]


class Model(torch.nn.Module):
    """A model of many tensor sizes: some span several table rows, one is strided."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = [(37, 11), (5,), (0,), (), (64, 33), (70_001,)]
        weights = [torch.randn(shape).to(dtype) for shape in shapes]
        weights.append(torch.randn(40_000).to(dtype)[::2])
        self.weights = torch.nn.ParameterList(map(torch.nn.Parameter, weights))
        self.register_buffer("count", torch.tensor(3))


def build_into(model: Model, **options: Any) -> fastema.EMA[Any]:
    return fastema.EMA(model, into=copy.deepcopy(model), buffers="copy", **options)


POWERS = [power(0.02 + 0.02 * k) if k % 2 else 1 - 0.5**k for k in range(11)]
AVERAGES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "plain": (fastema.EMA, {}),
    "wide": (fastema.EMA, {"shadow_dtype": "float32", "decay": warmup(0.9)}),
    "late": (fastema.EMA, {"start_after": 4, "update_every": 2, "decay": inverse_gamma(0.99)}),
    "narrow": (fastema.EMA, {"shadow_dtype": "bfloat16", "seed": 7}),
    "eight": (fastema.EMA, {"decay": POWERS[:8]}),
    "eleven": (fastema.EMA, {"decay": POWERS}),
    "ring on the host": (fastema.SMA, {"window": 3, "ring_device": "cpu"}),
    "nearest": (fastema.EMA, {"rounding": "nearest", "update_every": 3}),
    "debiased": (fastema.EMA, {"zero_debias": True}),
    "window": (fastema.SMA, {"window": 4}),
    "late window": (fastema.SMA, {"window": 4, "start_after": 3, "update_every": 2}),
    "into": (build_into, {"decay": 0.9, "update_every": 2}),
}
SLOW = ("nearest", "debiased", "window", "late window")


def mark_slow(names: Iterable[str], slow: tuple[str, ...]) -> list[Any]:
    return [pytest.param(one, marks=pytest.mark.slow if one in slow else []) for one in names]


@pytest.mark.each_value
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("case", mark_slow(AVERAGES, SLOW))
def test_gpu_averages_equal_cpu_averages(
    gpu: StubGpu, dtype: torch.dtype, capturable: bool, case: str
) -> None:
    kind, options = AVERAGES[case]
    if capturable and case == "ring on the host":
        with pytest.raises(ArgumentError, match="ring_device"):
            kind(Model(dtype), capturable=True, **options)
        return
    found = []
    for place in (0, None):
        gpu.place = lambda tensor, place=place: place
        model = Model(dtype)
        average = kind(model, capturable=capturable and place == 0, **options)
        if case == "ring on the host" and place == 0:
            ((_, entry),) = [one for one in average._memory if one[1].name == "weights.0"]
            assert [entry.parts[part][1].device for part in ("ring", "shadow")] == ["cpu", "cuda:0"]
        torch.manual_seed(9)
        for _ in range(12):
            change_weights(model.parameters())
            average.update()
        found.append(([dict(one) for one in average.shadows], average.num_updates))
    assert found[0][1] == found[1][1]
    for there, here in zip(found[0][0], found[1][0], strict=True):
        assert_equal(there, here)


@pytest.mark.parametrize("there", [True, False], ids=["to the CPU", "from the CPU"])
def test_a_run_resumes_on_the_other_device_to_the_bit(gpu: StubGpu, there: bool) -> None:
    options: dict[str, Any] = {"decay": (warmup(0.9), 0.99), "update_every": 2, "start_after": 3}
    torch.manual_seed(0)
    weights = [torch.randn(200).bfloat16(), torch.randn(3, 5)]

    def make_ema(on_gpu: bool) -> fastema.EMA:
        gpu.place = lambda tensor: 0 if on_gpu else None
        return fastema.EMA(weights, capturable=on_gpu, **options)

    reference, resumed = make_ema(False), make_ema(there)
    for step in range(14):
        if step == 7:
            gpu.place = lambda tensor: 0 if there else None
            state = resumed.state_dict()
            resumed = make_ema(not there)
            resumed.load_state_dict(state)
        change_weights(weights)
        gpu.place = lambda tensor: None
        reference.update()
        gpu.place = lambda tensor, step=step: 0 if there == (step < 7) else None
        resumed.update()
    assert resumed.num_updates == 14
    for one, other in zip(resumed.shadows, reference.shadows, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("capturable", [False, True])
def test_update_is_one_launch_per_group_and_no_other_call(gpu: StubGpu, capturable: bool) -> None:
    weights = {f"w{k}": torch.randn(1 + k % 300) for k in range(1000)}
    model = torch.nn.ParameterDict(weights)
    model.register_buffer("count", torch.tensor(3))
    ema = fastema.EMA(model, capturable=capturable)
    ema.update()
    gpu.driver.take()
    gpu.driver.calls.clear()
    gpu.context.calls.clear()
    for _ in range(5):
        change_weights(model.values())
        ema.update()
    launches = [("advance", 1, 77)] * capturable + [("lerp", 1000, 77), ("copy", 1, 77)]
    assert gpu.driver.take() == launches * 5
    count = 5 * len(launches)
    assert gpu.driver.calls == {"launch": count, "current": count}
    assert not gpu.context.calls


def test_captures_of_uncapturable_calls_are_refused(gpu: StubGpu) -> None:
    ema = fastema.EMA(Model())
    narrow = [torch.randn(5).bfloat16()]
    rounded = fastema.Plan(narrow, [torch.randn(5)], rounding="stochastic")
    rounded.lerp_(0.5)
    plan = fastema.Plan([torch.randn(5)], [torch.randn(5)])
    before = shadow(ema)
    gpu.context.captured = True
    for call, message in (
        (ema.update, "capturable=True"),
        (lambda: rounded.lerp_(0.5), "capturable"),
        (lambda: plan.lerp_(0.5), "once before capturing"),
    ):
        with pytest.raises(StateError, match=message):
            call()
    gpu.context.captured = False
    assert ema.num_updates == 0
    assert_equal(before, shadow(ema))
    plan.lerp_(0.5)
    gpu.context.captured = True
    plan.lerp_(0.5)


def test_refused_code_falls_back_but_out_of_memory_raises(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel may fit once memory is free, so no permanent fallback is chosen."""
    load, error = gpu.driver.function, DriverError("CUDA_ERROR_OUT_OF_MEMORY")

    def fails(code: bytes, name: str) -> NoReturn:
        raise error

    monkeypatch.setattr(gpu.driver, "function", fails)
    plan = fastema.Plan([torch.zeros(3)], [torch.ones(3)])
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY") as caught:
        plan.lerp_(0.5)
    assert "580" not in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(gpu.driver, "function", load)
        plan.lerp_(0.5)
    assert gpu.driver.take() == [("lerp", 1, 77)]
    error = DriverError("CUDA_ERROR_NO_BINARY_FOR_GPU")
    with pytest.warns(cuda_group.SlowWarning, match="NO_BINARY_FOR_GPU.*580"):
        fastema.copy_([torch.zeros(3)], [torch.ones(3).bfloat16()])


WITHOUT_KERNELS = {
    "stochastic": (fastema.EMA, {"decay": 0.75, "shadow_dtype": "bfloat16"}),
    "nearest": (fastema.EMA, {"decay": 0.75, "shadow_dtype": "float16", "rounding": "nearest"}),
    "two halves": (fastema.EMA, {"decay": warmup(0.9), "shadow_dtype": "bf16+16"}),
    "several": (fastema.EMA, {"decay": tuple(1 - 0.6**k for k in range(1, 12))}),
    "power": (fastema.PowerEMA, {"update_every": 2, "start_after": 1}),
    "window": (fastema.SMA, {"window": 3}),
    "two": (fastema.EMA, {"decay": (0.5, 0.75)}),
    "guarded": (fastema.EMA, {"decay": 0.75, "on_nonfinite": "skip"}),
}
RARE = ("nearest", "two halves", "window", "two", "guarded")
"""Cases whose CPU kernels no other test compiles."""


@pytest.mark.parametrize("case", mark_slow(WITHOUT_KERNELS, RARE))
def test_averages_without_kernels_match_the_cpu_up_to_rounding(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kind, options = WITHOUT_KERNELS[case]
    monkeypatch.setattr(engine, "cubin", raise_unavailable)
    torch.manual_seed(5)
    start = [torch.randn(61, 9), torch.randn(0), torch.randn(9, 14)[:, ::2], torch.tensor(7)]
    found = []
    for place in (0, None):
        gpu.place = lambda tensor, place=place: place
        weights = [tensor.clone() for tensor in start]
        slow = pytest.warns(cuda_group.SlowWarning) if place == 0 else nullcontext()
        with slow:
            average = kind(weights, **options)
        torch.manual_seed(6)
        for step in range(9):
            change_weights(weights[:3])
            if case == "guarded" and step == 4:
                weights[0][2, 2], kept = torch.inf, weights[0][2, 2].clone()
                average.update()
                weights[0][2, 2] = kept
                continue
            average.update()
        raw = [tensor.clone() for tensor in weights]
        index = {} if len(average.shadows) == 1 else {"which": 1}
        with average.swapped(**index):
            applied = [tensor.clone() for tensor in weights]
        assert all(map(torch.equal, raw, weights))
        drifts = [average.drift(which=k) for k in range(len(average.shadows))]
        tensors = [*(t for one in average.shadows for t in one.values()), *applied]
        found.append((tensors, drifts, average.num_updates, average.num_skipped))
    (tensors, drifts, *counts), (others, measured, *same) = found
    assert counts == same
    # Stochastic runs draw different bits, so they may end a few places apart.
    narrow = {"stochastic": 6 * 2**-8, "nearest": 2**-9}.get(case, 2e-6)
    for one, other in zip(tensors, others, strict=True):
        torch.testing.assert_close(one, other, rtol=narrow, atol=narrow)
    for drift, other_drift in zip(drifts, measured, strict=True):
        assert drift == pytest.approx(other_drift, rel=max(1e-4, narrow))


def test_a_model_on_two_devices_launches_on_both(gpu: StubGpu) -> None:
    weights = list(Model().parameters())
    averages = [p.detach().clone() for p in weights]
    second = {one.data_ptr() for side in (weights, averages) for one in side[3:]}
    gpu.place = lambda tensor: int(tensor.data_ptr() in second)
    gpu.contexts[1].handle = 78
    plan = fastema.Plan(averages, weights)
    before = [a.clone() for a in averages]
    change_weights(weights)
    plan.lerp_(0.25)
    assert {stream for _, _, stream in gpu.driver.take()} == {77, 78}
    assert gpu.driver.calls["push"] == gpu.driver.calls["pop"] > 0
    assert gpu.driver.contexts == [1000]
    for average, start, weight in zip(averages, before, weights, strict=True):
        torch.testing.assert_close(average, start.lerp(weight.detach(), 0.25))
