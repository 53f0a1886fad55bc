"""Facts about this machine for ``fastema doctor``: the kernel cache, shipped kernels, GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fastema.engine import disk_cache, native, shipped

__all__ = ["Cache", "Gpu", "cache", "gpu", "shipped_level", "shipped_targets"]


class Cache(NamedTuple):
    """The disk cache of compiled kernels."""

    folder: Path | None  # None if no folder is private and writable: each process compiles
    nbytes: int


class Gpu(NamedTuple):
    """The state of the NVIDIA driver, the first GPU, and whether its kernels are shipped."""

    driver: str  # empty if the driver works, otherwise the reason
    capability: tuple[int, int] | None = None
    shipped: bool = False  # the wheel has GPU kernels


def cache() -> Cache:
    """Return the folder of the kernel cache and its size."""
    folder = disk_cache.folder()
    files = folder.rglob("*") if folder is not None else ()
    return Cache(folder, sum(one.stat().st_size for one in files if one.is_file()))


def shipped_level() -> str:
    """Return the CPU level of the shipped kernels that run here; an empty string if none do."""
    return next(iter(native.supported_levels()), "") if shipped.has_kernels("cpu") else ""


def shipped_targets() -> dict[str, list[str]]:
    """Return what this installation has compiled kernels for, by kind of device."""
    return {"cpu": shipped.targets("cpu"), "gpu": shipped.targets("gpu")}


def gpu() -> Gpu:
    """Query the driver for the first GPU."""
    from fastema.engine.driver import Driver, DriverError

    try:
        capability = Driver().capability(0)
    except (OSError, DriverError) as error:
        return Gpu(str(error))
    return Gpu("", capability, shipped.has_kernels("gpu"))
