"""Updates, swaps and replays allocate no device memory."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastema

from .given import FLOATS

pytestmark = [pytest.mark.gpu, pytest.mark.torch]


def count_allocations(job: Callable[[], object]) -> tuple[int, int, int]:
    """Return a job's allocator requests, peak bytes, and bytes requested from the driver."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    job()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    requests, held = "allocation.all.allocated", "allocated_bytes.all"
    reserved = "reserved_bytes.all.current"
    return (
        after[requests] - before[requests],
        after[f"{held}.peak"] - before[f"{held}.current"],
        after[reserved] - before[reserved],
    )


def weights_of(dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Create two tensors of several megabytes and many small ones."""
    sizes = [3_000_001, 1_000_000, *range(1, 200)]
    return {f"w{i}": torch.randn(n, device=device).to(dtype) for i, n in enumerate(sizes)}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("f32", {}),
        ("f64", {}),
        ("bf16", {"shadow_dtype": "float32"}),
        ("bf16", {}),
        ("bf16", {"shadow_dtype": "bf16+16"}),
        ("f16", {"decay": (0.9, 0.99, 0.999), "shadow_dtype": "float32"}),
        ("bf16", {"capturable": True}),
        ("f32", {"on_nonfinite": "propagate", "update_every": 2}),
    ],
)
def test_updates_allocate_no_memory(gpu: torch.device, model: str, options: dict[str, Any]) -> None:
    ema = fastema.EMA(weights_of(FLOATS[model], gpu), **options)

    def updates() -> None:
        for _ in range(4):
            ema.update()

    updates()
    assert count_allocations(updates) == (0, 0, 0)


@pytest.mark.parametrize(
    ("model", "average"),
    [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("bf16", "bf16+16"), ("f64", "f64")],
)
def test_swaps_windowed_means_and_plans_allocate_no_memory(
    gpu: torch.device, model: str, average: str
) -> None:
    weights = weights_of(FLOATS[model], gpu)
    ema, wide = fastema.EMA(weights, 0.9, shadow_dtype=average), weights_of(torch.float32, gpu)
    sma = fastema.SMA(wide, 3)
    plan = fastema.Plan({name: tensor.clone() for name, tensor in wide.items()}, wide)

    def work() -> None:
        with ema.swapped():
            pass
        for _ in range(7):
            sma.update()
        plan.lerp_(0.5)
        plan.copy_()
        plan.swap_()

    work()
    assert count_allocations(work) == (0, 0, 0)


def test_replays_allocate_no_memory(gpu: torch.device) -> None:
    ema = fastema.EMA(weights_of(torch.bfloat16, gpu), 0.9, capturable=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update()
    graph.replay()
    assert count_allocations(graph.replay) == (0, 0, 0)


def test_deleted_averages_free_their_memory(gpu: torch.device) -> None:
    """Whatever streams and calls they were used with."""
    weights = weights_of(torch.bfloat16, gpu)

    def use_averages() -> None:
        ema = fastema.EMA(weights, (0.9, 0.99), shadow_dtype="float32")
        sma = fastema.SMA(weights, 4)
        side = torch.cuda.Stream()
        for one in (ema, sma):
            one.update()
            with torch.cuda.stream(side):
                side.wait_stream(torch.cuda.default_stream())
                one.update()
            torch.cuda.synchronize()
            with one.swapped(which=0):
                pass
        _ = ema.drift(which=1), ema.state_dict()

    def allocated_bytes() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    use_averages()
    before = allocated_bytes()
    for _ in range(3):
        use_averages()
    assert allocated_bytes() == before
