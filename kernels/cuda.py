"""The kernels of a GPU: every operation's step in a grid of threads, compiled without a GPU.

numba-cuda makes PTX, cuda.core links it to a cubin; both are imported when a kernel is compiled.
"""

from __future__ import annotations

import re
import threading
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from numba import types

from fastema.kernels import steps
from fastema.kernels.cpu_loops import weight
from fastema.kernels.cuda_loops import row_bodies
from fastema.kernels.jit import device_fn
from fastema.kernels.table import (
    COLUMNS,
    DISTANCE,
    MEASURES,
    MEASURING,
    RESULTS,
    SLOT,
    SQUARE,
    STILL,
    TURN,
    WINDOW,
)
from fastema.kernels.words import load, pointer_f64, pointer_i64, store

THREADS = 256
"""Threads per block."""

_REGISTERS, _MORE = 32, {"~": 40, "f64": 40, "lerp_measured": 40, "window": 64}
"""Registers per thread: 32 let a multiprocessor be full; more for what would spill otherwise."""

_compiling = threading.Lock()


class Binary(NamedTuple):
    """A compiled kernel: its name in the cubin, the cubin, and what the assembler reported."""

    name: str
    ptx: str
    cubin: bytes
    registers: int
    stack: int
    spilled: int


def bodies(operation: str, formats: tuple[str, ...], layout: str):
    """``body(cells, at, values, settings, thread, threads) -> sums`` of one thread and row.

    The same function runs on host addresses, thread after thread: the test of the GPU's kernels
    where there is none.
    """
    if operation == "window":
        dst, src, ring, low = formats
        return _window(steps.window(dst, src, ring, low, "cuda"), layout)
    step = getattr(steps, operation)(*formats, device="cuda")
    (walk,) = row_bodies([step], layout)
    real = step.real

    @device_fn
    def body(cells, at, values, settings, thread, threads):
        return walk(cells, at, real(weight(cells, at, values)), settings, 0, thread, threads)

    return body


def _window(parts: steps.Window, layout: str):
    slide, grow, put, begin, fold = row_bodies(parts, layout)
    real = parts.slide.real

    @device_fn
    def body(cells, at, values, settings, thread, threads):
        n = real(weight(cells, at, values))
        slots, slot = load(settings, WINDOW), load(settings, SLOT)
        turn = load(settings, TURN)
        if turn == 1:
            put(cells, at, n, settings, slot, thread, threads)
            begin(cells, at, n, settings, slot, thread, threads)
        elif turn <= slots:
            grow(cells, at, n, settings, slot, thread, threads)
        elif (at // COLUMNS + turn) % slots:
            slide(cells, at, n, settings, slot, thread, threads)
        else:
            put(cells, at, n, settings, slot, thread, threads)
            begin(cells, at, n, settings, 0, thread, threads)
            other = np.int64(1)
            while other < slots:
                fold(cells, at, real(other + 1), settings, other, thread, threads)
                other += 1
        return 0.0, 0.0, 0.0

    return body


def _kernel(operation: str, formats: tuple[str, ...], layout: str):
    from numba import cuda

    body = bodies(operation, formats, layout)
    if operation not in MEASURING:

        def kernel(table, rows, numbers, control):
            cells, settings, values = pointer_i64(table), pointer_i64(control), pointer_f64(numbers)
            thread, threads = np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
            row = np.int64(cuda.blockIdx.x)
            while row < rows:
                body(cells, row * COLUMNS, values, settings, thread, threads)
                row += np.int64(cuda.gridDim.x)

        return kernel

    def measuring(table, rows, numbers, control):
        cells, settings, values = pointer_i64(table), pointer_i64(control), pointer_f64(numbers)
        results = pointer_f64(load(settings, RESULTS))
        thread, threads = np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        sums = cuda.shared.array((MEASURES, THREADS), np.float64)
        row = np.int64(cuda.blockIdx.x)
        while row < rows:
            one, two, three = body(cells, row * COLUMNS, values, settings, thread, threads)
            sums[DISTANCE, thread], sums[SQUARE, thread], sums[STILL, thread] = one, two, three
            half = THREADS // 2
            while half:  # always in the same order, so that a rerun measures the same
                cuda.syncthreads()
                if thread < half:
                    for measure in range(MEASURES):
                        sums[measure, thread] += sums[measure, thread + half]
                half //= 2
            if thread == 0:
                for measure in range(MEASURES):
                    store(results, row * MEASURES + measure, sums[measure, 0])
            cuda.syncthreads()
            row += np.int64(cuda.gridDim.x)

    return measuring


def compile_kernel(
    operation: str, formats: tuple[str, ...], layout: str, capability: tuple[int, int]
) -> Binary:
    """Compile one operation for GPUs of a compute capability.

    Raises
    ------
    ImportError
        If numba-cuda, cuda.core or a library that they need is missing.
    """
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda
    from numba.cuda import dispatcher

    asking = (operation, formats[0][-1], *formats)
    most = max(_REGISTERS, *(_MORE.get(what, 0) for what in asking))
    int64 = types.int64
    with _compiling:
        # A device function asks which GPU there is, which also would take a context on it.
        asked = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability, id=0)
        try:
            ptx, _ = cuda.compile_ptx(
                _kernel(operation, formats, layout),
                types.void(int64, int64, int64, int64),
                cc=capability,
            )
        finally:
            dispatcher.get_current_device = asked
    major, minor = capability
    arch = f"sm_{major}{minor}"
    options = LinkerOptions(arch=arch, max_register_count=most, ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    linked = linker.link("cubin")
    log = linker.get_info_log()
    entry = re.search(r"\.entry\s+(\w+)", ptx)
    assert entry is not None

    def reported(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found.group(1)) if found else 0

    spilled = reported(r"(\d+) bytes spill stores") + reported(r"(\d+) bytes spill loads")
    registers, stack = reported(r"Used (\d+) registers"), reported(r"(\d+) bytes stack")
    return Binary(entry.group(1), ptx, bytes(linked.code), registers, stack, spilled)
