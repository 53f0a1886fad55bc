"""Race ``fastema.checkpoint.average`` on finished checkpoints against a safetensors loop."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.race.processes import call_in_subprocess
from bench.race.question import Question, Settings
from bench.race.report import Figure, Row, Rows, number
from bench.race.shapes import gpt2

CASES = (("float16", 20, 2, 1), ("float32", 10, 2, 0))
"""Dtype, number of checkpoints, rounds with warm and with cold page cache."""


def write(folder: str, count: int, dtype: str, share: float) -> int:
    """Write checkpoints with a share of GPT-2's tensors, randomly filled; return their bytes."""
    import torch
    from safetensors.torch import save_file

    shapes = [shape for _, shape in gpt2()]
    shapes = shapes[: max(int(len(shapes) * share), 1)]
    nbytes = 0
    for i in range(count):
        torch.manual_seed(i)
        tensors = {f"t{k}": torch.randn(s).to(getattr(torch, dtype)) for k, s in enumerate(shapes)}
        path = Path(folder) / f"step-{100 * i}.safetensors"
        save_file(tensors, path)
        nbytes += path.stat().st_size
    return nbytes


def _paths(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("step-*"), key=lambda path: int(path.stem.split("-")[1]))


def _fastema(folder: str, out: str) -> None:
    from fastema.checkpoint import average

    paths = _paths(folder)
    average(paths, [1 / len(paths)] * len(paths), out)


def _loop(folder: str, out: str, accumulator: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    paths = _paths(folder)
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, tensor in load_file(path).items():
            if name not in total:
                total[name] = torch.zeros(tensor.shape, dtype=getattr(torch, accumulator))
            total[name].add_(tensor, alpha=1 / len(paths))
    save_file({name: one.to(tensor.dtype) for name, one in total.items()}, out)
    os.sync()


def _copy(folder: str, out: str) -> None:
    """Read all bytes into a buffer, and write the size of one checkpoint."""
    buffer = memoryview(bytearray(1 << 22))
    for path in _paths(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with open(out, "wb", buffering=0) as file:
        for _ in range(-(-path.stat().st_size // len(buffer))):
            file.write(buffer)
        os.fsync(file.fileno())


WAYS: dict[str, Any] = {
    "fastema.checkpoint.average, float64": _fastema,
    "load_file, add_, save_file; float32": lambda *at: _loop(*at, "float32"),
    "load_file, add_, save_file; float64": lambda *at: _loop(*at, "float64"),
    "reading the bytes, writing a checkpoint": _copy,
}


def measure(way: str, folder: str, cold: bool) -> tuple[float, int]:
    """Return the seconds and the extra peak memory in MB of one way, after a small trial run."""
    with tempfile.TemporaryDirectory() as small:  # import and compile beforehand
        write(small, 2, "float16", 0.05)
        WAYS[way](small, os.path.join(small, "out.safetensors"))
    if cold:
        for path in _paths(folder):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = os.path.join(folder, "out.safetensors")
    began = time.perf_counter()
    WAYS[way](folder, out)
    seconds = time.perf_counter() - began
    os.unlink(out)
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10


def rows(settings: Settings) -> Rows:
    """Yield the rows of each way, with warm and with cold page cache."""
    for dtype, count, *rounds in CASES:
        count, share, rounds = (4, 0.2, [1, 1]) if settings.quick else (count, 1.0, rounds)
        folder = tempfile.mkdtemp()
        try:
            nbytes = call_in_subprocess(write, folder, count, dtype, share)
            for cold, times in enumerate(rounds):
                table = f"{count} checkpoints, {dtype}, {'not ' * cold}in the page cache"
                found: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
                for _ in range(times):
                    for way in WAYS:
                        found[way].append(
                            tuple(call_in_subprocess(measure, way, folder, bool(cold)))
                        )
                if times:
                    yield from _compare_ways(table, found, nbytes)
        finally:
            shutil.rmtree(folder)


def _compare_ways(table: str, found: dict[str, list[tuple[float, int]]], nbytes: int) -> Rows:
    least = {way: min(one for one, _ in several) for way, several in found.items()}
    *_, floor = least.values()
    for way, several in found.items():
        figures = {
            "seconds": least[way],
            "GB_s": nbytes / least[way] / 1e9,
            "of_bytes": least[way] / floor,
            "peak_more_mb": max(peak for _, peak in several),
        }
        yield Row(table, way, figures)


METHOD = """\
Checkpoints of GPT-2 small's tensors as safetensors, averaged into one of the same dtype and
synchronised to the disk. Every figure is of a process of its own that has done the same with two
small checkpoints before, the ways in turn; the least of two rounds, of one where nothing was in the
page cache. *Of the bytes* is the time beside reading all bytes into one buffer and writing one
checkpoint. Memory is what the process took at its peak beyond the small trial's."""

QUESTION = Question(
    "How fast finished checkpoints are averaged",
    METHOD,
    rows,
    packages=("numpy", "numba", "torch", "safetensors"),
    figures={
        "seconds": Figure("seconds", number),
        "GB_s": Figure("GB/s read", number),
        "of_bytes": Figure("of the bytes", number),
        "peak_more_mb": Figure("memory, MB", number),
    },
)
