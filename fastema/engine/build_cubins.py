"""``python -m fastema.engine.build_cubins``: compile the GPU kernels that a wheel brings.

With the toolkit of CUDA 12.9, whose machine code the drivers of CUDA 12 and 13 load, and without a
GPU. It takes ten minutes on two cores and fails where one kernel does, or is not found afterwards.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

from fastema.engine.shipped import (
    CAPABILITIES,
    FOLDER,
    PTX,
    PTX_CAPABILITY,
    Kernels,
    entry_name,
    kernels,
    write,
)
from fastema.kernels.stamp import source_stamp
from fastema.kernels.variants import Variant, variants

__all__ = ["build", "main"]

_PTX_VERSION: Final = "8.8"
"""What the toolkit of CUDA 12.9 writes."""

_FUSIBLE: Final = re.compile(r"\b(add|sub|mul|mad)\.f(32|64)\b")
"""Arithmetic that does not say how it is rounded: the assembler may make a fused product and sum of
it, which a kernel asks for by ``fma.rn`` where it wants one."""

_AT_ONCE: Final = 32
"""Kernels that the same processes compile."""

_NEWER: Final = 99, 0
"""A GPU that there is no machine code for."""

Codes = dict[str, bytes]
"""Code by the folder that it is for."""


def _compiled(variant: Variant) -> Codes:
    """Compile one kernel for every target: PTX once for those that have all instructions."""
    from fastema.kernels import cuda

    codes: Codes = {}
    for begin in dict.fromkeys(min(one, PTX_CAPABILITY) for one in CAPABILITIES):
        ptx = cuda.translate(*variant, begin)
        found = re.search(r"\.version (\S+)", ptx.text)
        if found is None or found[1] != _PTX_VERSION:
            raise RuntimeError(
                f"PTX is of version {found and found[1]}, not {_PTX_VERSION}: the toolkit is not "
                "that of CUDA 12.9 (pip install 'fastema[cuda12]' 'cuda-toolkit==12.9.*')"
            )
        if ptx.name != entry_name(variant.operation):
            raise RuntimeError(f"{variant}: its kernel is called {ptx.name}")
        if _FUSIBLE.search(ptx.text):
            raise RuntimeError(f"{variant}: a product and a sum of it could be fused")
        for capability in CAPABILITIES:
            if min(capability, PTX_CAPABILITY) == begin:
                made = cuda.assemble(ptx, capability)
                if made.spilled or made.stack:
                    raise RuntimeError(f"{variant} for {capability}: it spills registers")
                codes["sm_{}{}".format(*capability)] = made.cubin
        if begin == PTX_CAPABILITY:
            codes[PTX] = ptx.text.encode()
    return codes


def _all_compiled(wanted: Sequence[Variant], processes: int) -> Iterator[tuple[Variant, Codes]]:
    """Yield kernels and their code, compiled by processes that end now and then.

    Compilers do not give memory back.
    """
    context = multiprocessing.get_context("spawn")
    for first in range(0, len(wanted), _AT_ONCE):
        some = wanted[first : first + _AT_ONCE]
        with ProcessPoolExecutor(processes, context, initializer=gc.disable) as pool:
            yield from zip(some, pool.map(_compiled, some), strict=True)


def build(folder: Path, wanted: Sequence[Variant], processes: int) -> None:
    """Compile kernels into a folder, which is replaced once all are there."""
    began, operations = time.monotonic(), dict.fromkeys(one.operation for one in wanted)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new, done = Path(temporary) / "cubins", 0
        for operation in operations:
            ours = [one for one in wanted if one.operation == operation]
            made: dict[str, Kernels] = {}
            for variant, codes in _all_compiled(ours, processes):
                for target, code in codes.items():
                    made.setdefault(target, {})[variant.formats, variant.layout] = code
            for target, kernels_of_target in made.items():
                write(new / target / f"{operation}.xz", kernels_of_target)
            done += len(ours)
            spent = time.monotonic() - began
            print(f"{operation}: {done} of {len(wanted)} kernels, {spent:.0f} s", flush=True)
        (new / "stamp").write_text(source_stamp(), encoding="ascii")
        for operation in operations:
            expected = {one[1:] for one in wanted if one.operation == operation}
            for capability in (*CAPABILITIES, _NEWER):
                if kernels(new, operation, capability).keys() != expected:
                    raise RuntimeError(f"{operation} for {capability}: not what was to be written")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(
        f"{folder}: {len(wanted)} kernels for {len(CAPABILITIES)} capabilities and PTX, "
        f"{size / 1e6:.2f} MB"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write them")
    parser.add_argument("--operation", action="append", help="only kernels of this; for tests")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    wanted = [one for one in variants() if not args.operation or one.operation in args.operation]
    build(args.folder, wanted, args.processes)


if __name__ == "__main__":
    main(sys.argv[1:])
