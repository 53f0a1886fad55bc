"""Count, without timing: imported modules, operations, allocations, bytes per element."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastema
from bench.questions import launch
from bench.race.question import Question, Settings
from bench.race.report import ROOT, Figure, Row, Rows, number

IMPORTS = {
    "import fastema": "import fastema",
    "import fastema.tracking, one average": (
        "import fastema.tracking as t; t.SimpleMovingAverage(9).update(1.0)"
    ),
    "an average of a PyTorch model, one update": (
        "import torch; before = set(sys.modules); import fastema; "
        "fastema.EMA(torch.nn.Linear(2, 2)).update()"
    ),
}

PAIRS = {
    "float32": (torch.float32, None),
    "bfloat16, average float32": (torch.bfloat16, "float32"),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, average bf16+16": (torch.bfloat16, "bf16+16"),
    "float16, average float32": (torch.float16, "float32"),
}

CAPABILITY = 9, 0
GPU_KERNELS = (("f32", "f32"), ("f32", "bf16"), ("bf16~", "bf16"))

KB = 4
"""Memory of Python objects is rounded up to a multiple of this number of kB."""


class _OperationCounter(TorchDispatchMode):
    """A context manager that counts PyTorch operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _count_modules() -> Iterator[Row]:
    for name, statement in IMPORTS.items():
        code = (
            "import json, sys\nbefore = set(sys.modules)\n"
            f"{statement}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
        )
        for _ in range(2):  # the first run may have to compile kernels
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        found = json.loads(done.stdout)
        ours = sum(one.partition(".")[0] == "fastema" for one in found)
        heavy = {"numpy", "numba", "torch", "jax", "keras", "matplotlib", "safetensors"}
        figures = {"modules": ours, "heavy": ", ".join(sorted(heavy & set(found))) or "none"}
        yield Row("Modules of fastema that are imported", name, figures)


def _count_work(call: Callable[[], object]) -> dict[str, int]:
    """Return the PyTorch operations of a call, and the peak memory of its Python objects."""
    for _ in range(3):
        call()
    with _OperationCounter() as counted:
        call()
    tracemalloc.start()
    call()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    call()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return {"operations": counted.count, "python_kb": -(-peak // (KB << 10)) * KB}


def _count_calls() -> Iterator[Row]:
    for name, (dtype, shadow) in PAIRS.items():
        torch.manual_seed(0)
        weights = [torch.randn(300, dtype=dtype) for _ in range(100)]
        ema = fastema.EMA(weights, 0.999, shadow_dtype=shadow)

        def swap(ema: Any = ema) -> None:
            with ema.swapped():
                pass

        state = ema.state_dict()
        stored = sum(state[k].itemsize for k in ("shadow.0.0", "residual.0.0") if k in state)
        figures = {"bytes_per_element": dtype.itemsize + 2 * stored}
        yield Row("100 tensors: an update", name, {**figures, **_count_work(ema.update)})
        yield Row("100 tensors: swap and back", name, _count_work(swap))


def _launches() -> Iterator[Row]:
    """Yield the number of GPU driver calls per update, counted without a GPU."""
    table = "A GPU model of 100 tensors: an update"
    if shutil.which("cc") is None:
        yield from (Row(table, name, missing="there is no C compiler") for name in launch.VARIANTS)
        return
    for row in launch.rows(Settings(quick=True)):
        if row.table == "100 tensors":
            yield Row(table, row.entry, {"driver_calls": row["driver_calls"]})


def _machine_code() -> Iterator[Row]:
    """Yield counts from the machine code of GPU kernels, without a GPU."""
    major, minor = CAPABILITY
    for formats in GPU_KERNELS:
        table, name = f"Kernels of sm_{major}{minor}", f"lerp {'/'.join(formats)}"
        try:
            from bench.questions import kernels_gpu
            from fastema.kernels import cuda

            made = cuda.compile_kernel("lerp", formats, "flat", CAPABILITY)
            found = kernels_gpu.row(("lerp", formats), CAPABILITY, made)
        except (ImportError, FileNotFoundError) as error:  # no compiler, or no nvdisasm
            yield Row(table, name, missing=str(error))
            continue
        kept = ("instructions_per_element", "registers", "spilled_bytes")
        yield Row(table, name, {one: found[one] for one in kept})


def rows(settings: Settings) -> Rows:
    """Return the rows of all counts, which are the same in quick mode."""
    return [*_count_modules(), *_count_calls(), *_launches(), *_machine_code()]


METHOD = f"""\
Nothing here is timed: the numbers are the same on every machine, and `make bench-quick` fails if
they differ from the stored ones. *Operations* is the number of PyTorch operations in a call,
*Python's objects* the peak of their memory in it, in steps of {KB} kB, and *driver calls* the
number of calls that a GPU's driver would get. Machine code varies a little between CUDA toolkits:
the check fails if it grows by more than a quarter."""

QUESTION = Question(
    "What an average does beside its kernels",
    METHOD,
    rows,
    packages=("torch", "numpy", "numba"),
    figures={
        "modules": Figure("modules", str),
        "heavy": Figure("of others", str),
        "operations": Figure("operations", str),
        "python_kb": Figure("Python's objects, kB", str),
        "driver_calls": Figure("driver calls", str),
        "instructions_per_element": Figure("instructions per element", number),
        "registers": Figure("registers", str),
        "spilled_bytes": Figure("bytes spilled", str),
    },
)
