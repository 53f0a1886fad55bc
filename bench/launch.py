"""``python -m bench.launch``: what an update of a GPU model costs the host, measured without a GPU.

The real bindings call a driver that does nothing (``tests/engine/stub_libcuda.c``), and PyTorch's
CPU tensors pass for tensors on a GPU. What is missing is the time inside the real driver, about two
microseconds per launch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine, report

SOURCE = report.ROOT / "tests" / "engine" / "stub_libcuda.c"
COUNTS = (10, 100, 1_000)
VARIANTS: dict[str, dict[str, Any]] = {
    "EMA": {},
    'EMA, watch="sample"': {"watch": "sample"},
    "EMA, capturable": {"capturable": True},
    'EMA, capturable, watch="sample"': {"capturable": True, "watch": "sample"},
}


class DeviceContext:
    """A device whose memory is the host's."""

    index, device = 0, "cuda:0"

    def stream(self) -> int:
        return 7

    def capturing(self) -> bool:
        return False

    def upload(self, array: np.ndarray) -> tuple[np.ndarray, int]:
        there = array.copy()
        return there, there.ctypes.data

    def write(self, owner: np.ndarray, array: np.ndarray) -> None:
        owner[...] = array

    def hold(self, owners: Any) -> bool:
        return True


def on_a_gpu() -> None:
    """Let PyTorch's tensors pass for tensors on a GPU, and kernels for compiled ones."""
    import torch

    from fastema.bridges import torch as bridge
    from fastema.engine import cuda
    from fastema.engine.cubins import Cubin

    describe, zeros, context = bridge.describe, bridge.zeros, DeviceContext()

    def described(tensor: torch.Tensor) -> Any:
        return replace(describe(tensor), device=context.device, context=context)

    bridge.describe = described
    bridge.zeros = lambda length, code, _: zeros(length, code, "cpu")
    cuda.cubin = lambda key: Cubin(key.operation, bytes(64))


def micros(call: Callable[[], object], rounds: int, calls: int) -> float:
    """Median over rounds of the time of a call."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - began) / calls)
    return 1e6 * statistics.median(found)


def measure(rounds: int, calls: int) -> list[dict[str, Any]]:
    import torch
    from cuda.bindings import driver

    import fastema

    on_a_gpu()
    _, device = driver.cuDeviceGet(0)
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(device)[1])  # as PyTorch would have
    counter = ctypes.c_int64.in_dll(ctypes.CDLL("libcuda.so.1"), "stub_count")
    rows = []
    for count in COUNTS:
        torch.manual_seed(0)
        model = torch.nn.ParameterList(torch.randn(64) for _ in range(count))
        for name, options in VARIANTS.items():
            ema = fastema.EMA(model, 0.999, **options)
            micros(ema.update, 1, 100)
            counter.value = 0
            ema.update()
            asked = counter.value
            row = {"tensors": count, "entry": name, "us": micros(ema.update, rounds, calls)}
            rows.append({**row, "driver_calls": asked})
    return rows


_METHOD = (
    "The real bindings call a driver that does nothing, PyTorch's CPU tensors pass for tensors on "
    "a GPU: what is missing is the time inside the real driver, about 2 µs per launch. Tensors of "
    "64 elements in a `torch.nn.ParameterList`; medians of rounds of 1,000 updates. *All* looks at "
    "every tensor for one that moved, *sample* at a sixteenth of them in turn. Calls of the driver "
    "per update: one launch for the weights, one that advances the clock where there is one, and "
    "before each the question which context is current."
)


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a result."""
    head = ["host time per update, µs", *(f"{count:,} tensors" for count in COUNTS), "driver calls"]
    body = []
    for name in VARIANTS:
        of = {row["tensors"]: row for row in result["rows"] if row["entry"] == name}
        times = [report.number(of[count]["us"]) for count in COUNTS]
        body.append([name, *times, str(of[COUNTS[-1]]["driver_calls"])])
    parts = ["# What an update of a GPU model costs the host", report.provenance(result["header"])]
    return "\n\n".join([*parts, _METHOD, report.aligned(head, body)]) + "\n"


def measured_apart(quick: bool) -> list[dict[str, Any]]:
    """Measure in a process whose bindings find the driver that does nothing."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("bench.launch needs a C compiler, called cc")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        made = [compiler, "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*made, "-o", str(library), str(SOURCE)], check=True)
        paths = [folder, os.environ.get("LD_LIBRARY_PATH", "")]
        environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "bench.launch", "--apart", *(["--quick"] if quick else [])]
        found = subprocess.run(
            command, check=True, env=environment, stdout=subprocess.PIPE, text=True
        )
    rows: list[dict[str, Any]] = json.loads(found.stdout)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launch", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few calls")
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="DIR")
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.apart:
        json.dump(measure(*((5, 200) if options.quick else (21, 1_000))), sys.stdout)
        return 0
    command = "python -m bench.launch" + (" --quick" if options.quick else "")
    result = {"header": machine.header(command, "launch"), "rows": measured_apart(options.quick)}
    text = markdown(result)
    print(text)
    report.store(options.out, "launch-quick" if options.quick else "launch", result, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
