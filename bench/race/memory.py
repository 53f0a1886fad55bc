"""Peak extra memory of one call: how far resident memory rises above its size before the call.

Each job is set up and measured in its own process, forked from a process that has imported
everything and started no thread.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from bench.race.cases import FULL, QUICK, Case
from bench.race.processes import call_in_subprocess

# Return freed memory to the system at once. In the allocator's heap it would be reused by the next
# call and hide that call's temporaries.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

_HEAVY = ("fastema", "torch", "torch_ema", "ema_pytorch", "diffusers.training_utils")
_SAMPLING_S = 0.0005


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def _sample_peak(call: Callable[[], object]) -> int:
    """Return the highest resident size, in bytes, that a thread samples while `call` runs."""
    done = threading.Event()
    seen = [_status_bytes("VmRSS")]

    def watch() -> None:
        while not done.wait(_SAMPLING_S):
            seen.append(_status_bytes("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
        seen.append(_status_bytes("VmRSS"))
    finally:
        done.set()
        watcher.join()
    return max(seen)


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Return by how many bytes resident memory peaks above its size before `call`.

    Reset and read the kernel's own high-water mark where that is permitted (Linux, by writing 5 to
    ``/proc/self/clear_refs``). Otherwise a thread samples the resident size twice a millisecond.

    Raises
    ------
    OSError
        If the system has no ``/proc/self/status``.
    """
    before = _status_bytes("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return max(0, _sample_peak(call) - before)
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _measure_in_child(case: Case, name: str, pipe: Connection) -> None:
    from bench.race.jobs import prepare

    job = prepare(case, only=name, check=False)[name]
    job()
    pipe.send(peak_extra_bytes(job))
    pipe.close()


def _measure_job_peak(case: Case, name: str) -> int | None:
    """Return the peak extra bytes of one job in a forked process, or None if it failed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_in_child, args=(case, name, sender))
    process.start()
    sender.close()
    try:
        value: int | None = receiver.recv()
    except EOFError:  # the child's traceback is on stderr
        value = None
    process.join()
    return value


def measure_peaks(names: list[str], quick: bool) -> dict[str, dict[str, int | None]]:
    """Return case name -> peer name -> peak extra bytes.

    Call it in a process that has started no thread, because it forks.
    """
    for module in _HEAVY:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            print(f"bench.race.memory: {error}", file=sys.stderr)
    from bench.race.jobs import eligible_peers, refusals

    found: dict[str, dict[str, int | None]] = {}
    for case in (one for one in (QUICK if quick else FULL) if one.name in names):
        out = refusals(case)
        found[case.name] = {
            peer.name: _measure_job_peak(case, peer.name)
            for peer in eligible_peers(case)
            if peer.name not in out
        }
    return found


def measure_peaks_in_subprocess(cases: list[Case], quick: bool) -> dict[str, dict[str, int | None]]:
    """Return `measure_peaks`, measured in a fresh process.

    The dict is empty without cases, and on systems without ``fork`` or ``/proc``.
    """
    if not cases or not Path("/proc/self/status").exists() or not hasattr(os, "fork"):
        return {}
    names = [case.name for case in cases]
    found: dict[str, dict[str, int | None]] = call_in_subprocess(
        measure_peaks, names, quick, environment=ALLOCATOR
    )
    return found
