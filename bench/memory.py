"""Peak extra memory of one call: how far resident memory rises above where it stood before.

Each job is set up and measured in a process of its own, forked from one that has imported
everything and started no thread. ``python -m bench.memory [--quick] CASE ...`` prints JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from bench.cases import Case, select

ROOT = Path(__file__).resolve().parent.parent

# Freed memory goes back to the system at once instead of into the allocator's heap, where it would
# hide the next call's temporaries.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

_HEAVY = ("fastema", "torch", "torch_ema", "ema_pytorch", "diffusers.training_utils")
_SAMPLING_S = 0.0005


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def _sampled_peak(call: Callable[[], object]) -> int:
    """Return the highest resident size, in bytes, that a thread sees while `call` runs."""
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

    The kernel's own high-water mark is reset and read where that is permitted (Linux, writing 5
    to ``/proc/self/clear_refs``); otherwise a thread samples the resident size twice a millisecond.

    Raises
    ------
    OSError
        The system has no ``/proc/self/status``.
    """
    before = _status_bytes("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return max(0, _sampled_peak(call) - before)
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _child(case: Case, name: str, pipe: Connection) -> None:
    from bench.jobs import prepare

    job = prepare(case, only=name, check=False)[name]
    job()
    pipe.send(peak_extra_bytes(job))
    pipe.close()


def measure(case: Case, name: str) -> int | None:
    """Return the peak extra bytes of one job in a forked process, None if the process failed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, name, sender))
    process.start()
    sender.close()
    try:
        value: int | None = receiver.recv()
    except EOFError:  # the child's traceback is on stderr
        value = None
    process.join()
    return value


def measure_all(cases: list[Case], quick: bool) -> dict[str, dict[str, int | None]]:
    """Run this file in a fresh process; return case name -> peer name -> peak extra bytes.

    Empty without cases, and on systems without ``fork`` and ``/proc``.
    """
    if not cases or not Path("/proc/self/status").exists() or not hasattr(os, "fork"):
        return {}
    command = [sys.executable, "-m", "bench.memory", *(["--quick"] if quick else [])]
    command += [case.name for case in cases]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ALLOCATOR}, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("case", nargs="+")
    arguments = parser.parse_args()
    for module in _HEAVY:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            print(f"bench.memory: {error}", file=sys.stderr)
    from bench.jobs import refusals, table

    rows: dict[str, dict[str, int | None]] = {}
    for case in select(arguments.quick, arguments.case):
        out = refusals(case)
        rows[case.name] = {
            peer.name: measure(case, peer.name) for peer in table(case) if peer.name not in out
        }
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
