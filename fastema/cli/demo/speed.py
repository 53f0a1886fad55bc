"""Time one EMA update on this machine, and a plain move of as many bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import fastema
from fastema.engine import limit

ROUNDS = 10
CALLS = 10  # per round and candidate; the first is not timed: the caches hold another's bytes
SETTLE_S = 0.01  # after torch's work, OpenMP threads keep their cores busy for some milliseconds


@dataclass(frozen=True)
class Machine:
    """The cost of one update of a model on this machine when nothing else runs."""

    update_bytes: int  # read and written by one update
    start_s: (
        float  # to build the average and finish its first update: the kernel is compiled or loaded
    )
    update_s: float  # median of undisturbed updates
    limit_s: float  # median time of `yardstick`
    yardstick: Callable[[], None]  # moves `update_bytes`: the faster of two kernels that only copy

    def gbps(self, seconds: float) -> float:
        """Return the bandwidth, in GB/s, of moving `update_bytes` in `seconds`."""
        return self.update_bytes / seconds / 1e9


def measure(model: nn.Module) -> Machine:
    """Time updates of a throwaway average of `model`, interleaved with the bandwidth limit.

    Each candidate moves `update_bytes` per call in its own memory, several times in a row, so that
    all candidates find the caches in the same state.
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
    """Return the median seconds per call of each candidate, measured in turn."""
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
