"""GPU kernels by (operation, formats, layout, compute capability): shipped, or compiled once.

Kernels compiled here are cached on disk. The cache key is what their code depends on: the kernel,
the compute capability, and the versions of the compilers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

from fastema.engine import disk_cache, shipped
from fastema.engine.locks import compiling
from fastema.errors import DeviceError

__all__ = ["INSTALL", "Cubin", "Key", "Unavailable", "check_unfused", "cubin"]

_FUSIBLE: Final = re.compile(r"\b(add|sub|mul|mad)\.f(32|64)\b")
"""Arithmetic without a rounding mode: the assembler may fuse a product with a sum. A kernel that
wants a fused one asks for ``fma.rn``."""

INSTALL: Final = "pip install 'fastema[cuda]' ('fastema[cuda12]' for a driver of CUDA 12)"

_COMPILERS: Final = (
    *("numba", "numba-cuda", "llvmlite"),
    *("cuda-core", "nvidia-nvjitlink", "nvidia-nvvm", "cuda-toolkit"),
    *("nvidia-nvjitlink-cu12", "nvidia-cuda-nvcc-cu12"),
)
"""Distributions whose version may change the machine code; some may be missing."""


class Unavailable(DeviceError):
    """A kernel is not available here, now or later; a slower substitute may be."""


class Key(NamedTuple):
    """A kernel's operation, formats and layout, and the compute capability it is compiled for."""

    operation: str
    formats: tuple[str, ...]
    layout: str
    capability: tuple[int, int]


class Cubin(NamedTuple):
    """A kernel's machine code, and its name in that code."""

    name: str
    code: bytes


def _packed(made: Cubin) -> bytes:
    name = made.name.encode()
    return len(name).to_bytes(4, "little") + name + made.code


def _unpacked(body: bytes) -> Cubin:
    end = 4 + int.from_bytes(body[:4], "little")
    return Cubin(body[4:end].decode(), body[end:])


def check_unfused(ptx: str) -> None:
    """Raise a RuntimeError if an assembler may fuse products with sums of a kernel in PTX.

    Its results would differ from those of the CPU.
    """
    if _FUSIBLE.search(ptx):
        raise RuntimeError("its products and sums could be fused")


def _compile(key: Key) -> Cubin:
    try:
        with compiling:
            from fastema.kernels import cuda

            made = cuda.compile_kernel(*key)
        check_unfused(made.ptx)
    except Exception as error:  # the compilers' libraries share no base class of errors
        reason = next(iter(str(error).strip().splitlines()), "") or "no message"
        raise Unavailable(
            f"the GPU kernel {key.operation}({', '.join(key.formats)}) could not be compiled for "
            f"sm_{key.capability[0]}{key.capability[1]} ({type(error).__name__}: {reason}): "
            f"{INSTALL}"
        ) from error
    return Cubin(made.name, made.cubin)


def cubin(key: Key, compiled: Callable[[Key], Cubin] = _compile) -> Cubin:
    """Return a kernel's machine code: shipped, from the disk cache, or compiled now."""
    code = shipped.read("gpu", *key[:3], shipped.gpu_targets(key.capability))
    if code is not None:
        return Cubin(shipped.entry_name(key.operation), code)
    path = disk_cache.entry(*key, disk_cache.versions(*_COMPILERS), suffix=".cubin")
    body = disk_cache.read(path)
    if body is not None:
        return _unpacked(body)
    made = compiled(key)
    disk_cache.write(path, _packed(made))
    return made
