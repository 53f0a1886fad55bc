"""``python -m bench.kernels_gpu [--out DIR]``: what the GPU's kernels are made of, without a GPU.

Every kernel is compiled for every architecture and its machine code read: registers, spills,
instructions per element, bits per load and store. Nothing is run, so nothing here is a speed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import fastema
from bench import machine, report, sass
from fastema.kernels import cuda, steps
from fastema.kernels.formats import FORMATS

Kernel = tuple[str, tuple[str, ...]]
Row = dict[str, Any]

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
    ("lerp_measured", ("f32", "f32")),
    ("lerp_measured", ("f32", "bf16")),
    ("lerp_measured", ("bf16~", "bf16")),
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

_COMPILERS = (
    *("numba", "numba-cuda", "llvmlite", "cuda-core"),
    *("nvidia-nvvm", "nvidia-cuda-nvrtc", "nvidia-nvjitlink", "nvidia-cuda-nvdisasm"),
)


def versions() -> dict[str, str]:
    """Return what the machine code depends on, as far as it was installed by pip."""
    found = {"fastema": fastema.__version__}
    for package in _COMPILERS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def traffic(operation: str, formats: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the bytes per element of what is read and of what is written, stream by stream.

    Those of a windowed mean are of the usual update, when the ring is full.
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
    code: sass.Code, reads: Sequence[int], writes: Sequence[int]
) -> tuple[list[sass.Instruction], int]:
    """Return the loop that does the work, and the elements of one turn of it.

    It is the longest of the innermost loops that move all streams of as many elements as fill 128
    bits, or of a multiple of them.

    Raises
    ------
    ValueError
        If there is none.
    """
    elements = 16 // max(*reads, *writes, 0)
    found = []
    for loop in code.loops():
        loaded, stored = (_bits(sass.accesses(loop, name)) for name in ("LDG", "STG"))
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


def row(kernel: Kernel, capability: tuple[int, int], made: cuda.Binary) -> Row:
    """Return what is to be said of one kernel on one architecture."""
    operation, formats = kernel
    reads, writes = traffic(operation, formats)
    code = sass.disassembled(made.cubin)
    loop, elements = hot_loop(code, reads, writes)
    return {
        "operation": operation,
        "formats": list(formats),
        "architecture": f"sm_{capability[0]}{capability[1]}",
        "registers": made.registers,
        "stack_bytes": made.stack,
        "spilled_bytes": made.spilled,
        "bytes_per_element": sum(reads) + sum(writes),
        "instructions": len(code.instructions),
        "loop_instructions": len(loop),
        "loop_elements": elements,
        "loads": dict(sass.accesses(loop, "LDG")),
        "stores": dict(sass.accesses(loop, "STG")),
        "loop": dict(Counter(one.name for one in loop).most_common()),
    }


def measure() -> list[Row]:
    """Return the rows of all kernels and architectures, compiled on all cores."""
    asked = list(product(KERNELS, CAPABILITIES))
    with multiprocessing.get_context("spawn").Pool(machine.cores()) as pool:
        jobs = [
            pool.apply_async(cuda.compile_kernel, (*kernel, "flat", capability))
            for kernel, capability in asked
        ]
        return [row(*one, job.get()) for one, job in zip(asked, jobs, strict=True)]


def _accesses(moved: dict[Any, int]) -> str:
    """Return accesses such as ``2 x 128``, the widest first."""
    parts = sorted(((int(bits), count) for bits, count in moved.items()), reverse=True)
    return " + ".join(f"{count} x {bits}" if count > 1 else f"{bits}" for bits, count in parts)


def _cell(one: Row, usual: Row) -> str:
    """Return registers and instructions per element, and what is out of the ordinary."""
    text = f"{one['registers']}; {report.number(one['loop_instructions'] / one['loop_elements'])}"
    if one["spilled_bytes"] or one["stack_bytes"]:
        text += f"; spills {one['spilled_bytes']} B"
    if any(_accesses(one[kind]) != _accesses(usual[kind]) for kind in ("loads", "stores")):
        text += f"; {_accesses(one['loads'])} / {_accesses(one['stores']) or '-'}"
    return text


def table(rows: Iterable[Row]) -> str:
    """Return one line per kernel, one column per architecture."""
    kernels: dict[tuple[str, ...], dict[str, Row]] = {}
    for one in rows:
        key = one["operation"], *one["formats"]
        kernels.setdefault(key, {})[one["architecture"]] = one
    architectures = list(next(iter(kernels.values())))
    body = []
    for (operation, *formats), by_architecture in kernels.items():
        usual = by_architecture.get("sm_90") or next(iter(by_architecture.values()))
        body.append(
            [
                f"{operation} {'/'.join(formats)}",
                str(usual["bytes_per_element"]),
                str(usual["loop_elements"]),
                _accesses(usual["loads"]),
                _accesses(usual["stores"]) or "-",
                *(_cell(by_architecture[name], usual) for name in architectures),
            ]
        )
    head = ["", "bytes", "elements", "loads", "stores", *architectures]
    return report.aligned(head, body)


_READING = """\
The first format is that of the average, or of the side that is written, the second that of the
weights; `~` is rounded at random, `+16` is a bfloat16 with 16 more bits beside it, `raw` is moved
and not computed with; a windowed mean names its ring and its remainder too. *bytes* are those read
and written per element. *elements* are those of one turn of the hot loop, and *loads* and *stores*
the bits of each access in it.

In the columns of the architectures: registers per thread; instructions per element; and bytes that
are spilled, or other accesses, where there are any. The hot loop is the longest innermost loop that
moves all streams 128 bits at a time. Its instructions are counted as they stand between its label
and the branch back to it, that branch, predicated ones and ones that may be jumped over included,
and divided by its elements: what is issued by a thread per element is at most that. What is done
once per row of the table, elements of a tail, and the computations of a windowed mean other than of
its usual update are not in it. With at most 32 registers a multiprocessor of sm_80, sm_90 and
sm_100 can be full of threads, with at most 40 one of sm_120."""


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    header = result["header"]
    compilers = ", ".join(f"{name} {value}" for name, value in header["versions"].items())
    spills = sum(bool(one["spilled_bytes"] or one["stack_bytes"]) for one in result["rows"])
    count = len(result["rows"])
    parts = [
        "# The GPU kernels' machine code",
        f"{compilers}. `{header['command']}` on {header['date_utc']}"
        + (f", commit {header['commit']}." if header["commit"] else "."),
        "Compiled and disassembled, not run: no GPU was used, and no number here is a speed.",
        _READING,
        table(result["rows"]),
        f"{spills} of {count} spill." if spills else f"None of the {count} spills.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Compile, print and keep the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    header = {
        "command": "python -m bench.kernels_gpu",
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": versions(),
    }
    result = {"header": header, "rows": measure()}
    text = markdown(result)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "kernels-gpu"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
