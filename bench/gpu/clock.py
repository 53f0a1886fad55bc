"""How long a device works on a call, how long the call keeps the host, and what memory it takes."""

from __future__ import annotations

import gc
import os
import time
from typing import NamedTuple, Protocol

import torch

from bench.race.clock import seconds
from bench.race.contest import Job

_MOST_AHEAD_S = 0.02
_SCRATCH_BYTES = 256 << 20
_CYCLES = 50_000_000


class Memory(NamedTuple):
    """What one call allocates: requests and bytes at the peak, and bytes taken from the driver."""

    allocations: int
    peak_bytes: int
    driver_bytes: int


class Clock(Protocol):
    """What a race needs to know of a device."""

    device: torch.device

    def device_time(self, job: Job, ahead_s: float) -> float:
        """Return for how long the device works on one call, in seconds.

        `ahead_s` is about what the call takes the host: so long the device is kept busy with other
        work, that all of the call may be queued when it gets there.
        """

    def host_time(self, job: Job) -> float:
        """Return how long one call keeps the host, in seconds, with nothing queued before it."""

    def memory(self, job: Job) -> Memory | None:
        """Return what one call allocates, or None where that cannot be counted."""

    def free_bytes(self) -> int:
        """Return the bytes of memory that tensors can still take."""

    def wait(self) -> None:
        """Return when the device has done all it was given."""

    def release(self) -> None:
        """Give back what deleted tensors held."""


class EventClock:
    """A GPU's clock: device events.

    Before every call memory larger than the caches is read, so that nothing of what the call needs
    lies there, nor anything that is still to be written back, and a kernel that only waits keeps
    the device until the call is queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        caches = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.randn(max(4 * caches, _SCRATCH_BYTES) // 4, device=device)
        self._total = torch.zeros((), device=device)
        self._cycles_per_s = 0.0
        for _ in range(2):  # the first time it is loaded, too
            self._cycles_per_s = _CYCLES / self._between_events(lambda: torch.cuda._sleep(_CYCLES))

    @staticmethod
    def _between_events(job: Job) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        job()
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
    """The host's clock in place of a GPU's, for dry runs."""

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
    """Return the clock of a device."""
    return EventClock(device) if device.type == "cuda" else HostClock(device)


class Budget:
    """Time that a run may take, from when it is made.

    Parameters
    ----------
    seconds
        All of it.
    """

    def __init__(self, seconds: float) -> None:
        self._began = time.perf_counter()
        self._seconds = seconds

    def spent(self) -> float:
        """Return the seconds that have gone by."""
        return time.perf_counter() - self._began

    def left(self) -> float:
        """Return the seconds that are left, none or more."""
        return max(self._seconds - self.spent(), 0.0)
