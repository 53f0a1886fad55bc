"""Measure how long averages on the device and on the host block training.

The weights are on a GPU if there is one. Otherwise they are copied from memory to memory, over an
artificial link with a chosen delay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import nn

import fastema
from bench.race.memory import peak_extra_bytes
from bench.race.question import Question, Settings
from bench.race.report import Figure, Row, Rows, number

MB = 1e6
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _nothing() -> None:
    pass


class LoopHooks:
    """Calls of a training loop: ``wait`` before each optimizer step, ``update`` after it."""

    def __init__(
        self, update: Callable[[], object] = _nothing, wait: Callable[[], object] = _nothing
    ) -> None:
        self.update, self.wait = update, wait
        self.steps: list[float] = []
        self.stalls: list[float] = []


class ByHand:
    """An average of weights that are copied to the host, as in loops with a CPU average."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = [one.detach() for one in model.parameters()]
        pinned = _DEVICE.type == "cuda"
        self._copies = [torch.empty_like(w, device="cpu", pin_memory=pinned) for w in self._weights]
        self._delay: Callable[[], object] = _nothing
        self._copy()
        self._ema = fastema.EMA(self._copies, 0.999, shadow_dtype="float32")

    def _copy(self) -> None:
        for copy, weight in zip(self._copies, self._weights, strict=True):
            self._delay()
            copy.copy_(weight)

    def slow_down(self, seconds: float) -> None:
        """Delay the copy of each tensor by this time in seconds."""
        self._delay = lambda: time.sleep(seconds)

    def update(self) -> None:
        """Copy the weights, then update the average."""
        self._copy()
        self._ema.update()


def _model(width: int, depth: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*layers).to(_DEVICE, dtype)


def time_loop(
    delay: float, width: int, depth: int, rounds: int, turns: int = 5, batch: int = 64
) -> Iterator[Row]:
    """Time training steps with each average, in turn, with a ``delay`` in seconds per tensor."""
    model = _model(width, depth, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True)
    x = torch.randn(batch, width, device=_DEVICE)
    hand, beside, skipping = (
        ByHand(model),
        fastema.EMA(model, 0.999, offload=True),
        fastema.EMA(model, 0.999, offload="skip"),
    )
    if delay:
        hand.slow_down(delay)
        for one in (beside, skipping):
            one._link.delay = lambda _: time.sleep(delay)  # type: ignore[attr-defined]
    plain = fastema.EMA(model, 0.999)
    entries = {
        "no average": LoopHooks(),
        "on the device": LoopHooks(plain.update),
        "on the host, by hand": LoopHooks(hand.update),
        "offload=True": _entry(beside),
        'offload="skip"': _entry(skipping),
    }
    for round_ in range(rounds + 1):
        for entry in entries.values():
            for _ in range(turns):
                found = _step(model, optimizer, x, entry)
                if round_:  # the first round loads kernels
                    entry.steps.append(found[0])
                    entry.stalls.append(found[1])
            for one in (beside, skipping):
                one.state_dict(copy=False)  # finish pending updates before the next entry
    base = median(entries["no average"].steps)
    skipped = skipping.offload_stats.steps_skipped  # type: ignore[attr-defined]
    for name, entry in entries.items():
        step = median(entry.steps)
        figures = {
            "step_ms": step * 1e3,
            "longer_ms": (step - base) * 1e3,
            "stall_ms": median(entry.stalls) * 1e3,
        }
        if name == 'offload="skip"':
            figures["skipped"] = skipped / ((rounds + 1) * turns)
        slow = f", {delay * 1e3:g} ms more for each tensor" if delay else ""
        yield Row(f"A step of training{slow}", name, figures)


def _entry(ema: Any) -> LoopHooks:
    return LoopHooks(ema.update, ema.wait)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, entry: LoopHooks
) -> tuple[float, float]:
    """Return the seconds of a step with its update, and the seconds that blocked training."""
    began = time.perf_counter()
    model(x).square().mean().backward()
    waited = time.perf_counter()
    entry.wait()
    stall = time.perf_counter() - waited
    optimizer.step()
    optimizer.zero_grad()
    _synchronize()
    updated = time.perf_counter()
    entry.update()
    ended = time.perf_counter()
    return ended - began, stall + ended - updated


def _synchronize() -> None:
    if _DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _memory(width: int, depth: int) -> Iterator[Row]:
    """Yield the memory for building, updating and swapping, on the host and on the GPU."""
    for dtype in (torch.float32, torch.bfloat16):  # load kernels and their imports
        with fastema.EMA(_model(2, 1, dtype), shadow_dtype="float32", offload=True).swapped():
            pass
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        model = _model(width, depth, dtype)
        weights = sum(one.nbytes for one in model.parameters())
        kept: list[Any] = []

        def build(model: nn.Module = model, kept: list[Any] = kept) -> None:
            kept.append(fastema.EMA(model, 0.999, shadow_dtype="float32", offload=True))

        def update(kept: list[Any] = kept) -> None:
            kept[0].update()
            kept[0].state_dict(copy=False)

        def swap(kept: list[Any] = kept) -> None:
            with kept[0].swapped():
                pass

        for call, function in (("build", build), ("update", update), ("swap and back", swap)):
            before = torch.cuda.memory_allocated() if _DEVICE.type == "cuda" else 0
            if _DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            figures = {"weights_mb": weights / MB, "host_mb": peak_extra_bytes(function) / MB}
            if _DEVICE.type == "cuda":
                figures["device_mb"] = (torch.cuda.max_memory_allocated() - before) / MB
            title = "Memory beyond what was held before the call, float32 average"
            yield Row(title, f"{name} weights: {call}", figures)


def rows(settings: Settings) -> Rows:
    """Return the rows of memory, and of steps for each delay of the link."""
    width, depth, rounds = (512, 4, 2) if settings.quick else (1024, 8, 12)
    torch.set_num_threads(1)
    fastema.set_num_threads(1)
    found = [*_memory(width, depth)]
    delays = (0.0,) if _DEVICE.type == "cuda" else (0.0, 0.002, 0.01)
    for delay in delays:
        found += time_loop(delay, width, depth, rounds)
    return found


METHOD = """\
A multilayer perceptron in float32 (8.4 million parameters, 1 million in quick mode), batch 64, SGD,
one thread for PyTorch and one for fastema; entries in turns of five steps, medians. *Stall* is the
time in `update()` and in the fence before `optimizer.step()`; *longer* is what the whole step takes
more than without an average, with what the thread beside it takes of the memory's bandwidth.
Without a GPU weights are copied from memory to memory, once as fast as it goes, then with a pause
for each tensor: an artificial link. *By hand* copies the weights to the host and averages them
there, both waited for."""

QUESTION = Question(
    "An average on the host: how long training waits",
    METHOD,
    rows,
    packages=("torch", "numpy", "numba"),
    figures={
        "step_ms": Figure("step, ms", number),
        "longer_ms": Figure("longer, ms", number),
        "stall_ms": Figure("stall, ms", number),
        "skipped": Figure("left out", "{:.0%}".format),
        "weights_mb": Figure("weights, MB", number),
        "host_mb": Figure("host, MB", number),
        "device_mb": Figure("GPU, MB", number),
    },
)
