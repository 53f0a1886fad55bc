"""A long run: ``python -m tests.faults.soak 200000 20000`` updates and swaps, memory and time.

Memory has to stay as it was after the first tenth, also where the average follows an optimizer,
weights are re-pointed at times, and states are saved and loaded.
"""

import gc
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastema

PARTS = 10


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) << 10


def soak(name: str, call: Callable[[int], Any], count: int) -> None:
    """Call something often; raise if memory grows."""
    seconds, held, traced = [], [], []
    for part in range(PARTS):
        if part == 1:
            tracemalloc.start()
        began = time.perf_counter()
        for i in range(count // PARTS):
            call(i)
        seconds.append(1e6 * (time.perf_counter() - began) / (count // PARTS))
        gc.collect()
        held.append(resident())
        traced.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    grown, objects = held[-1] - held[1], traced[-1] - traced[1]
    said = (
        f"{name}: {count:,} in parts of {min(seconds):.1f} to {max(seconds):.1f} us each; "
        f"memory {grown / 1e6:+.1f} MB, objects of Python {objects / 1e3:+.1f} kB"
    )
    print(said)
    assert grown < 8e6, said
    assert objects < 50e3, said


def run(updates: int, swaps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4, bias=False))
    model.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ema = fastema.EMA(model, decay=(0.99, 0.999), shadow_dtype="float32", on_nonfinite="skip")

    def moved(i: int) -> None:
        if i % 100 == 0:
            model[0].weight.data = model[0].weight.data.clone()
        ema.update()

    def swapped(i: int) -> None:
        with ema.swapped(which=i % 2):
            pass

    state = ema.state_dict()
    followed = fastema.EMA(model, decay=0.99)
    followed.follow(optimizer)
    soak("updates", lambda i: ema.update(), updates)
    soak("updates of weights that move", moved, updates // 10)
    soak("swaps", swapped, swaps)
    soak("steps that are followed", lambda i: optimizer.step(), updates // 10)
    soak("states saved", lambda i: ema.state_dict(), swaps)
    soak("states loaded", lambda i: ema.load_state_dict(state), swaps // 10)
    soak("averages built", lambda i: fastema.EMA(model, decay=0.9), swaps // 10)


if __name__ == "__main__":
    run(*map(int, sys.argv[1:]))
