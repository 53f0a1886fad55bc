"""Time one EMA update on this machine, and a plain move of as many bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import fastema
from fastema.cli.clock import interleave, seconds
from fastema.engine import limit

ROUNDS = 30


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

    Each candidate moves `update_bytes` per call in its own memory, right after an untimed call, so
    that all candidates find the caches in the same state.
    """
    ema: fastema.EMA

    def start() -> None:
        nonlocal ema
        ema = fastema.EMA(model, decay=0.5)
        ema.update()

    start_s = seconds(start)
    update_bytes = sum(
        parameter.numel() * (parameter.element_size() + 2 * ema.shadow[name].element_size())
        for name, parameter in model.named_parameters()
    )
    yardsticks: dict[str, Callable[[], None]] = {
        "read, read, write": limit.ReadReadWrite(update_bytes),
        "copy": limit.StreamCopy(update_bytes),
    }
    times = interleave({"update": ema.update, **yardsticks}, ROUNDS, hot=True)
    medians = {name: statistics.median(found) for name, found in times.items()}
    best = min(yardsticks, key=medians.__getitem__)
    return Machine(update_bytes, start_s, medians["update"], medians[best], yardsticks[best])
