"""``python -m bench gpu --preflight``: say in seconds what a run of the check would lose here.

Run it before a machine with a GPU is taken (``--device cpu``: everything but the device), and there
first of all. It imports neither torch nor Numba, and compiles nothing.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from bench.race.machine import COMMIT, commit
from bench.race.question import Settings
from fastema.engine import shipped
from fastema.kernels.stamp import source_stamp
from fastema.kernels.variants import cpu_variants, gpu_variants

_NEEDED = {
    "torch": "everything",
    "numpy": "everything",
    "numba": "the averages on the CPU that the tests compare with",
    "pytest": "the tests",
    "xdist": "tests on several cores (pytest-xdist)",
    "hypothesis": "the tests",
    "triton": "the row of torch.compile",
    "torch_ema": "its row",
    "ema_pytorch": "its rows",
    "timm": "its rows",
    "diffusers": "its rows",
    "importlib_metadata": "diffusers' rows, which import it",
}
"""Modules that the check uses -> what it loses without them."""


class Finding(NamedTuple):
    """What was looked at, what was found, and whether a run would lose something by it."""

    subject: str
    found: str
    lost: bool = False


def _kernels(device: shipped.Device) -> Finding:
    """Return whether all kernels of CPUs or of GPUs are compiled, from the sources as they are."""
    subject, folder = f"compiled kernels, {device}", shipped.FOLDER / device
    advice = f"`make compiled ARGS='--device {device}'`, after the last edit of kernels/"
    try:
        stamp = (folder / "stamp").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return Finding(subject, f"missing in {folder}: {advice}", lost=True)
    if stamp != source_stamp():
        return Finding(
            subject, f"stale, kernels/ was edited after they were compiled: {advice}", lost=True
        )
    variants = cpu_variants() if device == "cpu" else gpu_variants()
    wanted = {f"{one.operation}.xz" for one in variants}
    targets = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    lacking = [
        f"{path.name}: {', '.join(sorted(absent))}"
        for path in targets
        if (absent := wanted - {file.name for file in path.iterdir()})
    ]
    if not targets or lacking:
        return Finding(subject, f"incomplete ({'; '.join(lacking)}): {advice}", lost=True)
    return Finding(subject, f"{', '.join(path.name for path in targets)}, of these sources")


def _packages() -> Iterator[Finding]:
    for module, loses in _NEEDED.items():
        if find_spec(module) is None:
            yield Finding(f"package {module}", f"not installed: without it goes {loses}", lost=True)
    present = [name for name in _NEEDED if find_spec(name) is not None]
    yield Finding("packages", ", ".join(present) or "none")


def _gpu(index: int) -> Finding:
    """Return whether the driver and the installed torch find a GPU, with kernels for it."""
    from fastema.engine.driver import Driver, DriverError

    subject = f"device cuda:{index}"
    try:
        torch = version("torch")
        if torch.endswith("+cpu"):
            return Finding(subject, f"torch {torch} has no CUDA", lost=True)
        capability = Driver().capability(index)
    except (OSError, DriverError) as error:
        return Finding(subject, f"the CUDA driver cannot be used: {error}", lost=True)
    except PackageNotFoundError:
        return Finding(subject, "torch is not installed", lost=True)
    number = "{}.{}".format(*capability)
    targets = [
        one for one in shipped.gpu_targets(capability) if (shipped.FOLDER / "gpu" / one).is_dir()
    ]
    if not targets:
        return Finding(subject, f"no compiled kernels for capability {number}", lost=True)
    return Finding(subject, f"capability {number}, kernels {targets[0]}")


def _results(folder: Path) -> Finding:
    """Return whether results can be written; a folder that is not there yet is created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        reason = f"{type(error).__name__}: {error}; name a folder by --out DIR"
        return Finding("results", f"cannot be written ({reason})", lost=True)
    return Finding("results", f"go to {folder}")


def _commit() -> Finding:
    found = commit()
    if found:
        return Finding("commit", found)
    return Finding("commit", f"unknown: there is no .git here; set {COMMIT}", lost=True)


def findings(settings: Settings) -> Iterator[Finding]:
    """Yield what a run of the check with these settings needs, and whether it is there."""
    if platform.machine() in ("x86_64", "AMD64"):  # kernels of other CPUs are compiled there
        yield _kernels("cpu")
    yield _kernels("gpu")
    yield from _packages()
    kind, _, index = settings.device.partition(":")
    if kind == "cuda":
        yield _gpu(int(index or 0))
    else:
        yield Finding("device", "not looked for")
    yield _results(settings.out)
    yield _commit()


def main(settings: Settings) -> int:
    """Print the findings; return 1 if a run would lose something, else 0."""
    found = list(findings(settings))
    for one in found:
        print(f"{'LOST' if one.lost else 'fine'}  {one.subject}: {one.found}")
    lost = sum(one.lost for one in found)
    print(f"{lost} would be lost" if lost else "nothing would be lost")
    return int(lost > 0)
