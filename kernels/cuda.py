"""GPU kernels: every operation's step in a grid of threads, compiled without a GPU.

numba-cuda generates PTX and cuda.core links it to a cubin; both are imported on first compilation.
"""

from __future__ import annotations

import os
import re
import threading
from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from numba import types

from fastema.kernels import cuda_clock, steps
from fastema.kernels import table as abi
from fastema.kernels.cuda_loops import make_walks
from fastema.kernels.jit import device_fn
from fastema.kernels.operations import OPERATIONS
from fastema.kernels.rows import window_body
from fastema.kernels.table import GPU_THREADS, MAX_AVERAGES
from fastema.kernels.variants import CLOCK
from fastema.kernels.words import load, pointer_f64, pointer_i64, store

_REGISTERS = 32
"""Registers per thread at full occupancy; a kernel that would spill gets more."""

_MOST_REGISTERS = 128

_FEWER_THREADS = {
    (7, 5): 64,
    **dict.fromkeys(((8, 6), (8, 7), (8, 9), (11, 0), (12, 0), (12, 1)), 40),
}
"""Registers at full occupancy of multiprocessors with 1,024 or 1,536 threads instead of 2,048."""

_CONVERTS_BF16 = (8, 0)
"""The first compute capability with instructions that convert float32 to bfloat16."""

_compiling = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compiling._at_fork_reinit)


class Ptx(NamedTuple):
    """A kernel in PTX: its name and its text."""

    name: str
    text: str


class Binary(NamedTuple):
    """A compiled kernel: its name in the cubin, PTX, cubin, and the assembler's report."""

    name: str
    ptx: str
    cubin: bytes
    registers: int
    stack: int
    spilled: int


def make_body(operation: str, formats: tuple[str, ...], layout: str, device: str = "cuda"):
    """Return ``body(cells, at, head, number, now, thread, threads) -> sums`` for a thread and row.

    ``head`` is the result of :func:`load_head`; ``now`` holds the seed, the step, the window, the
    slot and the turn. The body also runs on host addresses, thread after thread, which tests GPU
    kernels without a GPU.
    """
    step = getattr(steps, operation)(*formats, device=device)
    if OPERATIONS[operation].needs_ring:
        dst, src, *_ = formats
        start = steps.copy(dst.removesuffix("~"), src, device)
        return _windowed(step, start, layout)
    (walk,) = make_walks([step], layout)
    convert = step.number

    @device_fn
    def body(cells, at, head, number, now, thread, threads):
        return walk(cells, at, convert(number), 0, (now[0], now[1], thread, threads, head))

    return body


def _windowed(parts: steps.WindowSteps, start: steps.Step, layout: str):
    update = window_body(make_walks(parts, layout), parts.slide.real)
    (copy,) = make_walks([start], layout)
    real = parts.slide.real

    @device_fn
    def body(cells, at, head, number, now, thread, threads):
        seed, step, window, slot, turn = now
        run = seed, step, thread, threads, head
        if turn == 0:  # the averages begin: copy the weights, unrounded by a ring's format
            copy(cells, at, real(number), 0, run)
        else:
            update(cells, at, number, window, slot, turn, run)
        return 0.0

    return body


@device_fn
def _choice(index, numbers):
    """Return ``numbers[index]``; kernel parameters cannot be indexed by a variable."""
    number = numbers[0]
    number = numbers[1] if index == 1 else number
    number = numbers[2] if index == 2 else number
    number = numbers[3] if index == 3 else number
    number = numbers[4] if index == 4 else number
    number = numbers[5] if index == 5 else number
    number = numbers[6] if index == 6 else number
    return numbers[7] if index == 7 else number


@device_fn
def load_head(cells, at):
    """Return a row's addresses of the written and of the other side, elements, and average.

    A GPU waits once for all four, not for one after the other.
    """
    dst, src = load(cells, at + abi.DST), load(cells, at + abi.SRC)
    return (dst, src, load(cells, at + abi.COUNT)), load(cells, at + abi.AVERAGE)


@device_fn
def _number(index, clock, numbers):
    """Return the number of an average, from the clock if there is one."""
    if clock:
        return load(pointer_f64(clock), abi.WEIGHTS + index)
    return _choice(index, numbers)


@device_fn
def _launch_args(clock, now):
    """Return the arguments that change from step to step, from the clock if there is one."""
    if clock:
        cells = pointer_i64(clock)
        seed, step = load(cells, abi.SEED), load(cells, abi.STEP)
        return seed, step, load(cells, abi.WINDOW), load(cells, abi.SLOT), load(cells, abi.TURN)
    return now


@device_fn
def _all_rows(clock, rows):
    return rows


@device_fn
def _rows_unless_idle(clock, rows):
    """Return the number of rows to work on: 0 if the clock is idle at this step."""
    if clock and load(pointer_i64(clock), abi.IDLE):
        return np.int64(0)
    return rows


def rows_to_do(operation: str):
    """Return the function ``(clock, rows) -> rows`` that counts an operation's rows to work on.

    ``finite`` ignores an idle clock, because it checks the weights before the clock advances.
    """
    return _all_rows if operation == "finite" else _rows_unless_idle


def _kernel(body, finish, to_do):
    """Return the kernel that calls a body, then ``finish`` with its sums, for its block's rows."""
    from numba import cuda

    def kernel(
        table, rows, results, clock, w0, w1, w2, w3, w4, w5, w6, w7, seed, step, window, slot, turn
    ):
        cells = pointer_i64(table)
        thread, threads = np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        row = np.int64(cuda.blockIdx.x)
        now = _launch_args(clock, (seed, step, window, slot, turn))
        rows = to_do(clock, rows)
        while row < rows:
            at = row * abi.COLUMNS
            head, average = load_head(cells, at)
            number = _number(average, clock, (w0, w1, w2, w3, w4, w5, w6, w7))
            found = body(cells, at, head, number, now, thread, threads)
            finish(results, clock, row, thread, found)
            row += np.int64(cuda.gridDim.x)

    return kernel


@device_fn
def _finish_nothing(results, clock, row, thread, found):
    pass


def _flag_or_count():
    """Return the function that flags a thread's finds on the clock, or counts without a clock."""
    from numba import cuda

    @device_fn
    def flag_or_count(results, clock, row, thread, found):
        if clock:
            if found > 0.0:  # all such threads write the same value
                cuda_clock.flag(clock)
            return
        sums = cuda.shared.array(GPU_THREADS, np.float64)
        sums[thread] = found
        half = GPU_THREADS // 2
        while half:
            cuda.syncthreads()
            if thread < half:
                sums[thread] += sums[thread + half]
            half //= 2
        if thread == 0:
            store(pointer_f64(results), row, sums[0])
        cuda.syncthreads()

    return flag_or_count


def _advance():
    from numba import cuda

    def kernel(first):
        thread, threads = np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        clock = first + np.int64(cuda.blockIdx.x) * (8 * abi.CLOCK_CELLS)
        before = cuda_clock.read(clock, first)
        cuda.syncthreads()  # all have read what the first thread will overwrite
        cuda_clock.advance(clock, before, thread, threads)

    return kernel


_PARAMETERS = types.void(*(types.int64,) * 4, *(types.float64,) * MAX_AVERAGES, *(types.int64,) * 5)


def compile_kernel(
    operation: str, formats: tuple[str, ...], layout: str, capability: tuple[int, int]
) -> Binary:
    """Compile one operation, or ``advance`` without formats, for GPUs of a compute capability.

    Raises
    ------
    ImportError
        If numba-cuda, cuda.core or a library that they need is missing.
    """
    return assemble(translate(operation, formats, layout, capability), capability)


def translate(
    operation: str, formats: tuple[str, ...], layout: str, capability: tuple[int, int]
) -> Ptx:
    """Translate a kernel to PTX for GPUs of a compute capability and newer."""
    if operation == CLOCK:
        return _ptx(operation, _advance(), types.void(types.int64), capability)
    device = "cuda" if capability >= _CONVERTS_BF16 else "cuda, bf16 by integers"
    body = make_body(operation, formats, layout, device)
    finish = _flag_or_count() if OPERATIONS[operation].counts else _finish_nothing
    kernel = _kernel(body, finish, rows_to_do(operation))
    return _ptx(operation, kernel, _PARAMETERS, capability)


def _name_of(operation: str) -> str:
    """Return a kernel's name; Numba's own has two hundred characters."""
    return f"fastema_{operation}"


def _ptx(operation: str, kernel, signature, capability: tuple[int, int]) -> Ptx:
    import_module("cuda.core")  # fail early: :func:`assemble` needs it
    import_module("numba_cuda")  # replaces numba's own, obsolete GPU target
    from numba import cuda
    from numba.cuda import dispatcher
    from numba.cuda.cudadrv import nvvm

    with _compiling:
        # A device function queries the current GPU, which would also create a context on it.
        asked, compiled = dispatcher.get_current_device, nvvm.compile_ir
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability, id=0)
        # Round a product and a sum separately, as on the CPU, unless the kernel uses fma.
        nvvm.compile_ir = lambda *args, **options: compiled(*args, **{**options, "fma": False})
        try:
            # Numba's settings would be the defaults of debug and opt.
            text, _ = cuda.compile_ptx(kernel, signature, debug=False, opt=True, cc=capability)
        finally:
            dispatcher.get_current_device, nvvm.compile_ir = asked, compiled
    entry = re.search(r"\.entry\s+(\w+)", text)
    assert entry is not None
    name = _name_of(operation)
    return Ptx(name, text.replace(entry.group(1), name))


def assemble(ptx: Ptx, capability: tuple[int, int]) -> Binary:
    """Assemble PTX to machine code, with the fewest registers that avoid spilling.

    The clock's kernel runs in a few blocks, so occupancy does not matter to it: with all the
    registers it wants, its loads are issued together.
    """
    if ptx.name == _name_of(CLOCK):
        return _assemble_with_registers(ptx, capability, _MOST_REGISTERS)
    least = _FEWER_THREADS.get(capability, _REGISTERS)
    for registers in range(least, _MOST_REGISTERS, 8):
        made = _assemble_with_registers(ptx, capability, registers)
        if not made.spilled:
            break
    return made


def _assemble_with_registers(ptx: Ptx, capability: tuple[int, int], registers: int) -> Binary:
    from cuda.core import Linker, LinkerOptions, ObjectCode

    major, minor = capability
    options = LinkerOptions(
        arch=f"sm_{major}{minor}", max_register_count=registers, ptxas_options=["-v"]
    )
    linker = Linker(ObjectCode.from_ptx(ptx.text.encode()), options=options)
    linked = linker.link("cubin")
    log = linker.get_info_log()

    def reported(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found.group(1)) if found else 0

    spilled = reported(r"(\d+) bytes spill stores") + reported(r"(\d+) bytes spill loads")
    used, stack = reported(r"Used (\d+) registers"), reported(r"(\d+) bytes stack")
    return Binary(ptx.name, ptx.text, bytes(linked.code), used, stack, spilled)
