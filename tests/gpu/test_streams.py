"""Updates run on the caller's stream, never wait, and allow memory to be freed meanwhile."""

import gc
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import fastema

from .given import FLAT, Expected, Twins, assert_equal_averages

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

CYCLES = 300_000_000
"""Cycles of a kernel that only waits: about a fifth of a second."""

COUNT = 1_000_003


def delay_stream() -> None:
    """Delay the work that is queued next on the current stream."""
    torch.cuda._sleep(CYCLES)


def test_an_update_is_queued_on_the_current_stream(gpu: torch.device) -> None:
    """The update sees work queued before it, and work queued after it sees the update."""
    weights = {"w": torch.randn(COUNT, device=gpu)}
    ema = fastema.EMA(weights, 0.9)
    expected = Expected(ema.shadow["w"], "w")
    new = torch.randn(COUNT, device=gpu)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        delay_stream()
        weights["w"].copy_(new)
        ema.update()
        seen = ema.shadow["w"].clone()
        weights["w"].fill_(float("nan"))
    side.synchronize()
    expected.update(new, 1 - 0.9, 1)
    expected.check(seen)
    expected.check(ema.shadow["w"])


def test_weights_freed_before_the_update_has_run_are_averaged(gpu: torch.device) -> None:
    """Their memory is not reused before the update has run."""
    x = torch.randn(COUNT, device=gpu)
    avg = torch.randn(COUNT, device=gpu)
    expected, values = Expected(avg, "w"), x.clone()
    plan = fastema.Plan([avg], [x])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        delay_stream()
        plan.lerp_(0.5)
    del x, plan
    gc.collect()
    taken = [torch.full((COUNT,), float("nan"), device=gpu) for _ in range(4)]
    torch.cuda.synchronize()
    expected.update(values, 0.5, 1)
    expected.check(avg)
    assert all(bool(one.isnan().all()) for one in taken)


def test_weights_replaced_before_the_update_has_run_are_averaged(gpu: torch.device) -> None:
    """The average locates the new memory; the old is freed while an update on it is pending."""
    parameter = torch.nn.Parameter(torch.randn(COUNT, device=gpu))
    ema = fastema.EMA({"w": parameter}, 0.9)
    expected = Expected(ema.shadow["w"], "w")
    values = [torch.randn(COUNT, device=gpu) for _ in range(3)]
    for step, one in enumerate(values, 1):
        expected.update(one, 1 - 0.9, step)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    taken = []
    for one in values:
        parameter.data = one.clone()  # allocated on the current stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            delay_stream()
            ema.update()
        parameter.data = parameter.data.clone()
        taken.append(torch.full((COUNT,), float("nan"), device=gpu))
    torch.cuda.synchronize()
    expected.check(ema.shadow["w"])
    assert len(taken) == 3


def test_an_average_dropped_before_its_update_has_run_is_updated(gpu: torch.device) -> None:
    """Its tables are freed with it, and the tensors taken from it are right."""
    weights = {f"w{i}": torch.randn(1_000 + i, device=gpu) for i in range(50)}
    ema = fastema.EMA(weights, 0.9)
    ema.update()
    shadows = dict(ema.shadow)
    expected = {name: Expected(tensor, name) for name, tensor in shadows.items()}
    for name, tensor in weights.items():
        tensor.normal_()
        expected[name].update(tensor, 1 - 0.9, 2)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        delay_stream()
        ema.update()
    del ema
    gc.collect()
    taken = [torch.full((256 * size,), -1, device=gpu) for size in range(1, 200)]
    torch.cuda.synchronize()
    for name, tensor in shadows.items():
        expected[name].check(tensor, name)
    assert len(taken) == 199


@contextmanager
def forbid_waits() -> Iterator[None]:
    """Make every wait for the device through PyTorch raise an error in a block."""

    def switch(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it misses some waits
            torch.cuda.set_sync_debug_mode(mode)

    switch("error")
    try:
        yield
    finally:
        switch("default")


def test_calls_never_wait_for_the_device(gpu: torch.device) -> None:
    """Checked by PyTorch's debug mode and by an event recorded before the calls."""
    weights = {f"w{i}": torch.randn(1_000 + i, device=gpu) for i in range(100)}
    narrow = {name: tensor.bfloat16() for name, tensor in weights.items()}
    averages = [
        fastema.EMA(weights, 0.9),
        fastema.EMA(narrow, (0.9, 0.99), shadow_dtype="float32"),
        fastema.EMA(narrow, 0.9),
        fastema.EMA(narrow, 0.9, capturable=True),
        fastema.SMA(weights, 3),
    ]
    plan = fastema.Plan({name: x.clone() for name, x in narrow.items()}, weights)

    def all_calls() -> None:
        for one in averages:
            one.update()
        plan.lerp_(0.5)
        averages[0].apply_shadow()
        averages[0].restore()

    all_calls()  # compiles kernels and uploads tables
    torch.cuda.synchronize()
    before = torch.cuda.Event()
    with forbid_waits():
        for _ in range(3):
            delay_stream()
        before.record()
        all_calls()
        assert not before.query()


def test_threads_update_concurrently_on_their_own_streams(gpu: torch.device) -> None:
    """None of the threads has used the device before."""
    givens = [Twins(FLAT, torch.bfloat16, gpu) for _ in range(4)]
    pairs = []
    for number, given in enumerate(givens):
        given.refresh(number)
        pairs.append((fastema.EMA(given.there, 0.9), fastema.EMA(given.here, 0.9)))
    torch.cuda.synchronize()
    together = threading.Barrier(len(givens))

    def work(number: int) -> None:
        together.wait(30)
        ema, twin = pairs[number]
        with torch.cuda.stream(torch.cuda.Stream(gpu)):
            for step in range(20):
                givens[number].refresh(100 * number + step)
                ema.update()
                twin.update()
            torch.cuda.current_stream().synchronize()

    with ThreadPoolExecutor(len(givens)) as pool:
        list(pool.map(work, range(len(givens)), timeout=120))
    for ema, twin in pairs:
        assert ema.num_updates == 20
        assert_equal_averages(ema, twin)
