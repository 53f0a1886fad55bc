"""Inspect the machine code of the GPU kernels, without a GPU.

Every kernel is compiled for every architecture and disassembled to count registers, spills,
instructions per element, and bits per load and store. No kernel is run, so no figure is a speed.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from bench.gpu import disassembly
from bench.race import machine
from bench.race.question import Question, Settings
from bench.race.report import Figure, Row, Rows, number
from fastema.kernels import cuda, steps
from fastema.kernels.formats import FORMATS

Kernel = tuple[str, tuple[str, ...]]

CAPABILITIES = ((8, 0), (9, 0), (10, 0), (12, 0))

KERNELS: tuple[Kernel, ...] = (
    ("lerp", ("f32", "f32")),
    ("lerp", ("f32", "bf16")),
    ("lerp", ("f32", "f16")),
    ("lerp", ("bf16", "bf16")),
    ("lerp", ("bf16", "f32")),
    ("lerp", ("f16", "f16")),
    ("lerp", ("f16", "f32")),
    ("lerp", ("bf16~", "bf16")),
    ("lerp", ("bf16~", "f32")),
    ("lerp", ("f16~", "f16")),
    ("lerp", ("bf16+16", "bf16")),
    ("lerp", ("bf16+16", "f32")),
    ("lerp", ("f64", "f64")),
    ("finite", ("f32", "f32")),
    ("finite", ("f32", "bf16")),
    ("copy", ("raw1", "raw1")),
    ("copy", ("raw2", "raw2")),
    ("copy", ("raw4", "raw4")),
    ("copy", ("raw8", "raw8")),
    ("copy", ("f32", "bf16")),
    ("copy", ("bf16", "f32")),
    ("cast_back", ("bf16+16", "f16")),
    ("swap", ("raw2", "raw2")),
    ("swap", ("raw4", "raw4")),
    ("swap", ("bf16+16", "raw4")),
    ("park", ("raw4", "raw2")),
    ("unpark", ("raw4", "raw2")),
    ("window", ("f32", "f32", "f32", "f32")),
    ("window", ("f32", "bf16", "bf16", "f32")),
    ("window", ("bf16~", "bf16", "bf16", "f32")),
)


def traffic(operation: str, formats: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the bytes per element of each stream that is read, and of each that is written.

    For a windowed mean they are those of the usual update, when the ring is full.
    """
    if operation == "window":
        step = steps.window(*formats, device="cuda").slide
    else:
        step = getattr(steps, operation)(*formats, device="cuda")
    of = step.formats
    streams = dict(zip("dlrs", (of.dst, of.residual, of.ring, of.src), strict=True))

    def sizes(letters: str) -> list[int]:
        return [FORMATS[streams[letter]].itemsize for letter in letters]

    return sizes(step.reads), sizes(step.writes)


def _bits(moved: Counter[int]) -> int:
    return sum(bits * count for bits, count in moved.items())


def hot_loop(
    code: disassembly.Code, reads: Sequence[int], writes: Sequence[int]
) -> tuple[list[disassembly.Instruction], int]:
    """Return the loop that does the work, and the number of elements that one iteration handles.

    An iteration must move all streams of as many elements as fill 128 bits in the widest stream, or
    a multiple of that number. The longest such innermost loop is returned.

    Raises
    ------
    ValueError
        If there is no such loop.
    """
    elements = 16 // max(*reads, *writes, 0)
    found = []
    for loop in code.loops():
        loaded, stored = (_bits(disassembly.accesses(loop, name)) for name in ("LDG", "STG"))
        turns, rest = (
            divmod(stored, 8 * elements * sum(writes))
            if writes
            else divmod(loaded, 8 * elements * sum(reads))
        )
        if turns and not rest and loaded >= 8 * turns * elements * sum(reads):
            found.append((loop, turns * elements))
    if not found:
        raise ValueError("no loop moves all streams")
    return max(found, key=lambda one: len(one[0]))


def row(kernel: Kernel, capability: tuple[int, int], binary: cuda.Binary) -> Row:
    """Return the row of a compiled kernel on one architecture."""
    operation, formats = kernel
    reads, writes = traffic(operation, formats)
    code = disassembly.disassemble_cubin(binary.cubin)
    loop, elements = hot_loop(code, reads, writes)
    figures = {
        "bytes": sum(reads) + sum(writes),
        "loop_elements": elements,
        "loads": dict(disassembly.accesses(loop, "LDG")),
        "stores": dict(disassembly.accesses(loop, "STG")),
        "registers": binary.registers,
        "waits": disassembly.count_waits(code, loop),
        "instructions_per_element": len(loop) / elements,
        "spilled_bytes": binary.spilled,
        "stack_bytes": binary.stack,
        "instructions": len(code.instructions),
        "loop_instructions": len(loop),
        "loop": dict(Counter(one.name for one in loop).most_common()),
    }
    entry = f"{operation} {'/'.join(formats)}"
    return Row(f"sm_{capability[0]}{capability[1]}", entry, figures)


def rows(settings: Settings) -> Rows:
    """Compile the chosen kernels for all architectures, on all cores, and return their rows."""
    asked = [
        (kernel, capability)
        for capability, kernel in product(CAPABILITIES, KERNELS)
        if settings.wants(kernel[0])
    ]
    with multiprocessing.get_context("spawn").Pool(machine.cores()) as pool:
        jobs = [
            pool.apply_async(cuda.compile_kernel, (*kernel, "flat", capability))
            for kernel, capability in asked
        ]
        return [row(*one, job.get()) for one, job in zip(asked, jobs, strict=True)]


def cases(settings: Settings) -> list[str]:
    """Return the names of the operations."""
    return list(dict.fromkeys(operation for operation, _ in KERNELS))


def accesses(moved: Mapping[Any, int]) -> str:
    """Format accesses such as ``2 x 128``, widest first."""
    parts = sorted(((int(bits), count) for bits, count in moved.items()), reverse=True)
    texts = (f"{count} x {bits}" if count > 1 else f"{bits}" for bits, count in parts)
    return " + ".join(texts) or "-"


METHOD = """\
Compiled and disassembled, not run: no GPU was used, and no number here is a speed.

The first format is that of the average, or of the side that is written, the second that of the
weights; `~` is rounded at random, `+16` is a bfloat16 with 16 more bits beside it, `raw` is moved
and not computed with; a windowed mean names its ring and its remainder too. *bytes* are those read
and written per element. *elements* are those of one turn of the hot loop, and *loads* and *stores*
the bits of each access in it. *registers* are those of a thread. *waits* are the times that a
thread waits for memory until it has the data of its first turn, a captured graph's clock included;
with columns of a row that were loaded one after another they were 5, with random bits 6.

The hot loop is the longest innermost loop that moves all streams 128 bits at a time. Its
instructions are counted as they stand between its label and the branch back to it, that branch,
predicated ones and ones that may be jumped over included, and divided by its elements: what is
issued by a thread per element is at most that. What is done once per row of the table, elements of
a tail, and the computations of a windowed mean other than of its usual update are not in it. With
at most 32 registers a multiprocessor of sm_80, sm_90 and sm_100 can be full of threads, with at
most 40 one of sm_120."""

COMPILERS = (
    *("numba", "numba-cuda", "llvmlite", "cuda-core"),
    *("nvidia-nvvm", "nvidia-cuda-nvrtc", "nvidia-nvjitlink", "nvidia-cuda-nvdisasm"),
    *("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvrtc-cu12", "nvidia-nvjitlink-cu12"),
)

QUESTION = Question(
    "The GPU kernels' machine code",
    METHOD,
    rows,
    cases,
    COMPILERS,
    figures={
        "bytes": Figure("bytes", str),
        "loop_elements": Figure("elements", str),
        "loads": Figure("loads", accesses),
        "stores": Figure("stores", accesses),
        "registers": Figure("registers", str),
        "waits": Figure("waits", str),
        "instructions_per_element": Figure("instructions per element", number),
        "spilled_bytes": Figure("spilled bytes", str),
        "stack_bytes": Figure("stack bytes", str),
    },
)
