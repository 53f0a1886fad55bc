"""Measure the host time of an update of a GPU model, without a GPU.

A stub driver does nothing (``tests/engine/stub_libcuda.c``), and PyTorch's CPU tensors pass for
tensors on a GPU. The time inside the real driver is missing: about two microseconds per launch.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.race.durations import summarize_times
from bench.race.processes import call_in_subprocess
from bench.race.question import Question, Settings
from bench.race.report import ROOT, Figure, Row, Rows

SOURCE = ROOT / "tests" / "engine" / "stub_libcuda.c"
COUNTS = (10, 100, 1_000)
VARIANTS: dict[str, dict[str, Any]] = {
    "EMA": {},
    "EMA, capturable": {"capturable": True},
}


class StubContext:
    """A stand-in for the context of a GPU, whose memory is the host's."""

    index, device, fallback_reason = 0, "cuda:0", None

    def stream(self) -> int:
        return 7

    def capturing(self) -> bool:
        return False

    def upload(self, array: np.ndarray) -> tuple[np.ndarray, int]:
        there = array.copy()
        return there, there.ctypes.data

    def write(self, owner: np.ndarray, array: np.ndarray) -> None:
        owner[...] = array

    def defer_reuse(self, owners: Any) -> bool:
        return True


def simulate_gpu() -> None:
    """Patch fastema to take PyTorch's CPU tensors for GPU tensors, and kernels for compiled."""
    import torch

    from fastema.bridges import torch as bridge
    from fastema.engine import cuda
    from fastema.engine.cubins import Cubin

    describe, zeros, context = bridge.describe, bridge.zeros, StubContext()

    def described(tensor: torch.Tensor) -> Any:
        return replace(describe(tensor), device=context.device, context=context)

    bridge.describe = described
    bridge.zeros = lambda length, code, _: zeros(length, code, "cpu")
    cuda.cubin = lambda key: Cubin(key.operation, bytes(64))


def durations(call: Callable[[], object], rounds: int, calls: int) -> list[float]:
    """Return the time in seconds of `calls` calls, once for each of `rounds` rounds."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        found.append(time.perf_counter() - began)
    return found


def measure(rounds: int, calls: int) -> list[dict[str, Any]]:
    """Return rows of updates; the process must find the stub driver as its CUDA driver."""
    import torch

    import fastema
    from fastema.engine.driver import Driver

    simulate_gpu()
    driver = Driver()
    driver.push(driver.context(0))  # PyTorch makes a context current, too
    counter = ctypes.c_int64.in_dll(ctypes.CDLL("libcuda.so.1"), "stub_count")
    rows = []
    for count in COUNTS:
        torch.manual_seed(0)
        model = torch.nn.ParameterList(torch.randn(64) for _ in range(count))
        for name, options in VARIANTS.items():
            ema = fastema.EMA(model, 0.999, **options)
            durations(ema.update, 1, 100)
            counter.value = 0
            ema.update()
            asked = counter.value
            figures = summarize_times(durations(ema.update, rounds, calls), "us", calls)
            figures["driver_calls"] = asked
            rows.append({"table": f"{count:,} tensors", "entry": name, "figures": figures})
    return rows


def rows(settings: Settings) -> Rows:
    """Build the stub driver, and measure in a process that loads it."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("the question `launch` needs a C compiler named cc")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        made = [compiler, "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*made, "-o", str(library), str(SOURCE)], check=True)
        paths = [folder, os.environ.get("LD_LIBRARY_PATH", "")]
        environment = {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}
        amount = (5, 200) if settings.quick else (21, 1_000)
        return [Row(**row) for row in call_in_subprocess(measure, *amount, environment=environment)]


METHOD = """\
The driver does nothing, PyTorch's CPU tensors pass for tensors on a GPU:
what is missing is the time inside the real driver, about 2 µs per launch. Tensors of 64 elements in
a `torch.nn.ParameterList`; medians of rounds of 1,000 updates, 200 in quick mode. An update looks
at every tensor for one that moved. Calls of the driver per update: one launch for the weights, one
that advances the clock where there is one, and before each the question which context is
current."""

QUESTION = Question(
    "What an update of a GPU model costs the host",
    METHOD,
    rows,
    figures={"driver_calls": Figure("driver calls", str)},
)
