"""What fastema does on a GPU besides updates: swaps, windows, averages on the host, CuPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch

import fastema
from bench.gpu.cases import DeviceCase, build, fill_
from bench.gpu.clock import Clock
from bench.gpu.race import Copy, host_time, time_beside_copy
from bench.gpu.targets import LINK, STEP, SWAP, WINDOW
from bench.race import shapes
from bench.race.checks import assert_equal, sample
from bench.race.flat_module import DTYPES
from bench.race.jobs import DECAY, check_swap, make_swap_job
from bench.race.peers import setup_ema
from bench.race.report import Row
from bench.race.shapes import total_elements
from fastema.engine.cuda_group import SlowWarning

CUPY = "CuPy: update of one array, f32"

_ROUNDS, _BUDGET_S = 20, 3.0


def _model_of(mix: str, quick: bool) -> tuple[DeviceCase, Callable[[], shapes.Inventory]]:
    inventory = partial(shapes.gpt2, 1, 16, 50, 8) if quick else shapes.gpt2
    return DeviceCase("gpt2-small", mix, inventory, _ROUNDS), inventory


def _swap(clock: Clock, quick: bool) -> Iterator[Row]:
    case, inventory = _model_of("bf16/f32", quick)
    model = build(case, clock.device)
    running = setup_ema()(model, DECAY, DTYPES["f32"])
    averages = [sample(one) for one in model.parameters()]  # exact in bfloat16
    fill_(model, 1)
    check_swap(running, model, averages)
    nbytes = total_elements(inventory()) * 2 * (2 * 2 + 2 * 4)  # two swaps read and write both
    yield from _beside_copy(SWAP, {"fastema.EMA": make_swap_job(running)}, nbytes, clock)


def _window(clock: Clock, quick: bool) -> Iterator[Row]:
    case, inventory = _model_of("f32/f32", quick)
    model = build(case, clock.device)
    average = fastema.SMA(model, window=3)
    seen = []
    for seed in range(1, 5):  # fill the window: all later calls do the same work
        fill_(model, seed)
        average.update()
        seen.append([sample(one).double() for one in model.parameters()])
    wanted = [sum(last[1:], last[0]) / 3 for last in zip(*seen[1:], strict=True)]
    found = [sample(average.shadow[name]).double() for name, _ in model.named_parameters()]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    nbytes = total_elements(inventory()) * 32
    yield from _beside_copy(WINDOW, {"fastema.SMA": average.update}, nbytes, clock)


def _beside_copy(
    title: str, jobs: dict[str, Callable[[], object]], nbytes: int, clock: Clock
) -> list[Row]:
    copy = Copy(nbytes, clock.device)
    return time_beside_copy(title, jobs, nbytes, copy, clock, rounds=_ROUNDS, budget_s=_BUDGET_S)


def _link(clock: Clock, quick: bool) -> Iterator[Row]:
    """Yield the bandwidth of the copy to pinned host memory that offloaded averages use."""
    from fastema.bridges.torch_link import Link

    weights = {"w": torch.randn(10_001 if quick else 64 << 20, device=clock.device).bfloat16()}
    link = Link(weights)

    def fetch() -> None:
        link.fetch(weights).complete()

    fetch()
    assert_equal([link.staging["w"]], [sample(weights["w"]).cpu()])
    seconds = host_time(fetch, clock)
    figures = {"weights_mb": link.nbytes / 1e6, "link_gbps": link.nbytes / seconds / 1e9}
    yield Row(LINK, "fastema, weights to the host", figures)


def _step(clock: Clock, quick: bool) -> Iterator[Row]:
    from bench.questions.offload import time_loop

    sizes = (16, 2, 1, 1, 8) if quick else (2048, 8, 4, 5, 8192)
    for row in time_loop(0.0, *sizes):
        names = {"skipped": "left_out"}  # the check counts skipped tests
        yield Row(STEP, row.entry, {names.get(k, k): value for k, value in row.figures.items()})


def _cupy(clock: Clock, quick: bool) -> Iterator[Row]:
    if find_spec("cupy") is None or clock.device.type != "cuda":
        yield Row(CUPY, "fastema.EMA", missing="cupy is not installed, or this is no GPU")
        return
    import cupy

    count = 1_000 if quick else 100_000_000
    with cupy.cuda.Device(clock.device.index or 0):
        weights = [cupy.random.standard_normal(count, dtype=cupy.float32)]
        average = fastema.EMA(weights, DECAY)
        weights[0] *= 3
        average.update()
        # The average began as a third of the weights.
        wanted = weights[0] * ((DECAY + 3 * (1 - DECAY)) / 3)
        assert bool(cupy.allclose(average.shadow["0"], wanted, rtol=1e-5, atol=1e-6))
        yield from _beside_copy(CUPY, {"fastema.EMA": average.update}, 12 * count, clock)


@dataclass(frozen=True)
class Extra:
    """Rows of something other than a race of updates, selected by `name`."""

    name: str
    title: str
    measure: Callable[[Clock, bool], Iterator[Row]]
    quick: bool = False

    def rows(self, clock: Clock) -> Iterator[Row]:
        """Measure, without autograd where no model is trained, and never torch's functions."""
        with torch.set_grad_enabled(self.title == STEP), warnings.catch_warnings():
            warnings.simplefilter("error", SlowWarning)
            rows = list(self.measure(clock, self.quick))
        yield from rows


def extras(quick: bool) -> list[Extra]:
    """Return what is measured besides the races; in quick runs, on tiny tensors."""
    return [
        Extra("swap", SWAP, _swap, quick),
        Extra("window", WINDOW, _window, quick),
        Extra("link", LINK, _link, quick),
        Extra("offload", STEP, _step, quick),
        Extra("cupy", CUPY, _cupy, quick),
    ]
