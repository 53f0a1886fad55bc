"""``python -m fastema.engine.build_kernels``: compile the kernels that a wheel ships.

CPU kernels (``--device cpu``) need only Numba, on Linux. GPU kernels need the CUDA 12.9 toolkit,
whose machine code the drivers of CUDA 12 and 13 load, but no GPU. Either set takes ten minutes on
two cores. The command fails if any kernel cannot be compiled or read back.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from fastema.engine import native
from fastema.engine.cubins import check_unfused
from fastema.engine.shipped import (
    CAPABILITIES,
    FOLDER,
    PTX,
    PTX_CAPABILITY,
    Device,
    Kernels,
    entry_name,
    gpu_targets,
    kernels,
    write,
)
from fastema.kernels.stamp import source_stamp
from fastema.kernels.variants import Variant, cpu_variants, gpu_variants

__all__ = ["build", "main"]

_PTX_VERSION: Final = "8.8"
"""The PTX version that the CUDA 12.9 toolkit writes."""

_AT_ONCE: Final = 32
"""Kernels that one pool of processes compiles before it is replaced."""

_NEWER: Final = 99, 0
"""The capability of a GPU without shipped machine code."""

Codes = dict[str, bytes]
"""Code by target folder."""


def _compile_for_cpu(variant: Variant) -> Codes:
    """Compile one kernel for the CPU level that this process was started for."""
    return {os.environ["NUMBA_CPU_NAME"]: native.compiled(*variant)}


def _compile_for_gpus(variant: Variant) -> Codes:
    """Compile one kernel for every GPU target; targets with all instructions share one PTX."""
    from fastema.kernels import cuda

    codes: Codes = {}
    for begin in dict.fromkeys(min(one, PTX_CAPABILITY) for one in CAPABILITIES):
        ptx = cuda.translate(*variant, begin)
        found = re.search(r"\.version (\S+)", ptx.text)
        if found is None or found[1] != _PTX_VERSION:
            raise RuntimeError(
                f"PTX is of version {found and found[1]}, not {_PTX_VERSION}: this is not the "
                "CUDA 12.9 toolkit (pip install 'fastema[cuda12]' 'cuda-toolkit==12.9.*')"
            )
        if ptx.name != entry_name(variant.operation):
            raise RuntimeError(f"{variant}: its kernel is called {ptx.name}")
        try:
            check_unfused(ptx.text)
        except RuntimeError as error:
            raise RuntimeError(f"{variant}: {error}") from None
        for capability in CAPABILITIES:
            if min(capability, PTX_CAPABILITY) == begin:
                made = cuda.assemble(ptx, capability)
                if made.spilled or made.stack:
                    raise RuntimeError(f"{variant} for {capability}: it spills registers")
                codes["sm_{}{}".format(*capability)] = made.cubin
        if begin == PTX_CAPABILITY:
            codes[PTX] = ptx.text.encode()
    return codes


class _Job(NamedTuple):
    """How to compile the kernels of one kind of device.

    ``wanted`` are the kernels. ``compiled`` is called in processes with each of ``environments``
    in turn. ``targets`` lists, for each device, the folders that it searches.
    """

    wanted: list[Variant]
    compiled: Callable[[Variant], Codes]
    environments: Sequence[Mapping[str, str]]
    targets: Sequence[Sequence[str]]


_JOBS: Final[Mapping[Device, _Job]] = {
    "cpu": _Job(
        cpu_variants(),
        _compile_for_cpu,
        [{"NUMBA_CPU_NAME": level, "NUMBA_CPU_FEATURES": ""} for level in native.LEVELS],
        [[level] for level in native.LEVELS],
    ),
    "gpu": _Job(
        gpu_variants(),
        _compile_for_gpus,
        [{}],
        [list(gpu_targets(capability)) for capability in (*CAPABILITIES, _NEWER)],
    ),
}


def _begin(environment: Mapping[str, str]) -> None:
    """Set up a worker process, before Numba is imported."""
    gc.disable()
    os.environ.update(environment)


def _compile_all(
    job: _Job, wanted: Sequence[Variant], processes: int
) -> Iterator[tuple[Variant, Codes]]:
    """Yield kernels and their code, compiled in processes that are replaced from time to time.

    Compilers do not release memory.
    """
    context = multiprocessing.get_context("spawn")
    for first in range(0, len(wanted), _AT_ONCE):
        some = wanted[first : first + _AT_ONCE]
        for environment in job.environments:
            with ProcessPoolExecutor(processes, context, _begin, (environment,)) as pool:
                yield from zip(some, pool.map(job.compiled, some), strict=True)


def _selected(variant: Variant, names: Sequence[str]) -> bool:
    """Return whether ``names`` has a kernel's operation, or ``operation:format:...``."""
    full = ":".join((variant.operation, *variant.formats))
    return not names or variant.operation in names or full in names


def build(folder: Path, device: Device, names: Sequence[str], processes: int) -> None:
    """Compile kernels and replace a folder with them once all are compiled.

    ``names`` selects operations (``lerp``), or operations with their formats (``lerp:f32:bf16``);
    an empty sequence selects all.
    """
    if device == "cpu" and not native.has_levels():
        raise RuntimeError("CPU kernels for a wheel must be compiled on Linux, on x86-64")
    job, began, done = _JOBS[device], time.monotonic(), 0
    wanted = [one for one in job.wanted if _selected(one, names)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / device
        for operation in dict.fromkeys(one.operation for one in wanted):
            ours = [one for one in wanted if one.operation == operation]
            made: dict[str, Kernels] = {}
            for variant, codes in _compile_all(job, ours, processes):
                for target, code in codes.items():
                    made.setdefault(target, {})[variant.formats, variant.layout] = code
            for target, kernels_of_target in made.items():
                write(new / target / f"{operation}.xz", kernels_of_target)
            expected = {one[1:] for one in ours}
            if any(kernels(new, operation, names).keys() != expected for names in job.targets):
                raise RuntimeError(f"{operation}: the kernels read back are not those compiled")
            done += len(ours)
            spent = time.monotonic() - began
            print(f"{operation}: {done} of {len(wanted)} kernels, {spent:.0f} s", flush=True)
        (new / "stamp").write_text(source_stamp(), encoding="ascii")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{folder}: {len(wanted)} {device} kernels, {size / 1e6:.2f} MB")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="output folder")
    parser.add_argument("--device", choices=list(_JOBS), action="append", help="default: all")
    parser.add_argument(
        "--operation",
        action="append",
        default=[],
        metavar="NAME[:FORMAT...]",
        help="only this one, as lerp or lerp:f32:bf16; for tests",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    for device in args.device or _JOBS:
        build(args.folder / device, device, args.operation, args.processes)


if __name__ == "__main__":
    main(sys.argv[1:])
