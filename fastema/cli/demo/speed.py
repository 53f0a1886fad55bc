"""Time of one EMA update on this machine, beside that of moving as many bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import fastema
from fastema.engine import limit

ROUNDS = 10
CALLS = 10  # per round and candidate; the first finds the caches full of another's bytes
SETTLE_S = 0.01  # OpenMP threads keep their cores busy for some milliseconds after torch's work


@dataclass(frozen=True)
class Machine:
    """Cost of one update of a model on this machine when nothing else runs."""

    update_bytes: int  # read and written by one update
    start_s: float  # until the first update is done: its kernel is compiled or loaded
    update_s: float  # median of undisturbed updates
    limit_s: float  # the same number of bytes by `yardstick`, median
    yardstick: Callable[[], None]  # the faster of two kernels that only move bytes

    def gbps(self, seconds: float) -> float:
        """Bandwidth, in GB/s, of moving `update_bytes` in that time."""
        return self.update_bytes / seconds / 1e9


def measure(model: nn.Module) -> Machine:
    """Time updates of a throw-away average of `model` in turn with the bandwidth limit.

    Each moves `update_bytes` per call over memory of its own, several times in a row: all of them
    meet the caches in the same state.
    """
    began = time.perf_counter()
    ema = fastema.EMA(model, decay=0.5)
    ema.update()
    start_s = time.perf_counter() - began

    update_bytes = sum(
        parameter.numel() * (parameter.element_size() + 2 * ema.shadow[name].element_size())
        for name, parameter in model.named_parameters()
    )
    yardsticks: list[Callable[[], None]] = [
        limit.ReadReadWrite(update_bytes),
        limit.StreamCopy(update_bytes),
    ]
    update_s, *limits_s = _race([ema.update, *yardsticks])
    limit_s, yardstick = min(zip(limits_s, yardsticks, strict=True), key=lambda found: found[0])
    return Machine(update_bytes, start_s, update_s, limit_s, yardstick)


def _race(candidates: list[Callable[[], object]]) -> list[float]:
    """Median seconds per call of each candidate, measured in turn."""
    durations: list[list[float]] = [[] for _ in candidates]
    for _ in range(ROUNDS):
        for candidate, found in zip(candidates, durations, strict=True):
            time.sleep(SETTLE_S)
            candidate()
            for _ in range(CALLS - 1):
                began = time.perf_counter()
                candidate()
                found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in durations]
