"""Measure a call's time on the device, its time on the host, and its memory."""

from __future__ import annotations

import gc
import os
import time
from typing import NamedTuple, Protocol

import torch

from bench.race.contest import Job
from fastema.cli.clock import seconds

_MOST_AHEAD_S = 0.02
_SCRATCH_BYTES = 256 << 20
_CYCLES = 50_000_000


class Memory(NamedTuple):
    """Memory of one call: allocation requests, peak bytes, and bytes taken from the driver."""

    allocations: int
    peak_bytes: int
    driver_bytes: int


class Clock(Protocol):
    """Measurements of a device that a race needs."""

    device: torch.device

    waited: bool
    """Whether the device waited for the host in the latest call of `device_time`: the result is
    then the time of the host."""

    def device_time(self, job: Job, ahead_s: float) -> float:
        """Return how long the device works on one call, in seconds.

        `ahead_s` is an estimate of the call's host time. The device is kept busy for that long
        beforehand, so that the whole call is queued when the device reaches it. That fails for a
        call of more launches than the device's queue holds, about a thousand, and for one that
        takes more than 20 ms on the host or waits for the device: see `waited`.
        """

    def host_time(self, job: Job) -> float:
        """Return how long one call takes on the host, in seconds, with nothing queued before it."""

    def memory(self, job: Job) -> Memory | None:
        """Return what one call allocates, or None if allocations cannot be counted."""

    def free_bytes(self) -> int:
        """Return the bytes of memory that are available for tensors."""

    def wait(self) -> None:
        """Wait until the device has finished all queued work."""

    def release(self) -> None:
        """Free the memory of deleted tensors."""


class EventClock:
    """A clock that measures a GPU by device events.

    Before every timed call it reads memory larger than the caches, so that the caches hold neither
    data of the call nor pending writes. A kernel that only waits then keeps the device busy until
    the call is queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        caches = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.randn(max(4 * caches, _SCRATCH_BYTES) // 4, device=device)
        self._total = torch.zeros((), device=device)
        self._cycles_per_s = 0.0
        self.waited = False
        for _ in range(2):  # the first round also loads the kernel
            self._cycles_per_s = _CYCLES / self._between_events(lambda: torch.cuda._sleep(_CYCLES))

    def _between_events(self, job: Job) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        job()
        self.waited = start.query()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e-3

    def device_time(self, job: Job, ahead_s: float) -> float:
        torch.sum(self._scratch, dim=0, out=self._total)
        torch.cuda._sleep(int(min(ahead_s, _MOST_AHEAD_S) * self._cycles_per_s))
        return self._between_events(job)

    def host_time(self, job: Job) -> float:
        self.wait()
        return seconds(job)

    def memory(self, job: Job) -> Memory:
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_stats(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        job()
        self.wait()
        after = torch.cuda.memory_stats(self.device)
        left, _ = torch.cuda.mem_get_info(self.device)
        requests, held = "allocation.all.allocated", "allocated_bytes.all"
        return Memory(
            after[requests] - before[requests],
            after[f"{held}.peak"] - before[f"{held}.current"],
            max(free - left, 0),
        )

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return free + reserved - torch.cuda.memory_allocated(self.device)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        gc.collect()
        self.wait()
        torch.cuda.empty_cache()


class HostClock:
    """A clock that measures host time instead of a GPU's time, for dry runs."""

    waited = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def device_time(self, job: Job, ahead_s: float) -> float:
        return seconds(job)

    def host_time(self, job: Job) -> float:
        return seconds(job)

    def memory(self, job: Job) -> None:
        return None

    def free_bytes(self) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def wait(self) -> None:
        pass

    def release(self) -> None:
        gc.collect()


def clock_of(device: torch.device) -> Clock:
    """Return a clock for a device."""
    return EventClock(device) if device.type == "cuda" else HostClock(device)


class Budget:
    """A time limit that starts when the object is created.

    Parameters
    ----------
    seconds
        The limit.
    """

    def __init__(self, seconds: float) -> None:
        self._began = time.perf_counter()
        self._seconds = seconds

    def spent(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._began

    def left(self) -> float:
        """Return the seconds that are left, at least 0."""
        return max(self._seconds - self.spent(), 0.0)
