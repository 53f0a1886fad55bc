"""What there is to run kernels on this machine: threads, caches, GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fastema.engine import disk_cache, native, shipped

__all__ = ["Cache", "Gpu", "cache", "gpu", "shipped_level"]


class Cache(NamedTuple):
    """Compiled CPU kernels on the disk."""

    folder: Path | None  # None if no folder is writable: each process compiles again
    nbytes: int


class Gpu(NamedTuple):
    """What the driver of NVIDIA GPUs says, and where kernels come from."""

    driver: str  # empty if it works, else why not
    capability: tuple[int, int] | None = None
    shipped: bool = False  # kernels came with the wheel


def cache() -> Cache:
    """Find the folder of compiled CPU kernels, and what is in it."""
    folder = disk_cache.folder()
    files = folder.rglob("*") if folder is not None else ()
    return Cache(folder, sum(one.stat().st_size for one in files if one.is_file()))


def shipped_level() -> str:
    """Return the level of processors that kernels came compiled for, or nothing."""
    return next(iter(native.levels()), "") if shipped.current("cpu") else ""


def gpu() -> Gpu:
    """Ask the driver for the first GPU."""
    from fastema.engine.driver import Driver, DriverError

    try:
        capability = Driver().capability(0)
    except (OSError, DriverError) as error:
        return Gpu(str(error))
    return Gpu("", capability, shipped.current("gpu"))
