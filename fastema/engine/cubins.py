"""GPU kernels by (operation, formats, layout, compute capability): shipped, or compiled once.

What was compiled here is kept on disk. An entry is named by what its code depends on: the kernel,
all kernel sources, the compute capability, and the versions of the compilers. It carries a
checksum; one that does not fit is compiled again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

from fastema.engine import shipped
from fastema.errors import DeviceError

__all__ = ["INSTALL", "Cubin", "Key", "Unavailable", "cubin"]

INSTALL: Final = "pip install 'fastema[cuda]' ('fastema[cuda12]' for a driver of CUDA 12)"

_COMPILERS: Final = (
    *("numba", "numba-cuda", "llvmlite"),
    *("cuda-core", "nvidia-nvjitlink", "nvidia-nvvm", "cuda-toolkit"),
    *("nvidia-nvjitlink-cu12", "nvidia-cuda-nvcc-cu12"),
)
"""Distributions whose version may change what comes out; some may be missing."""

_MAGIC: Final = b"fastema cubin 1\n"
_HEAD: Final = len(_MAGIC) + hashlib.sha256().digest_size


class Unavailable(DeviceError):
    """A kernel cannot be had here, now or later; something slower may do."""


class Key(NamedTuple):
    """A kernel's operation and formats, and the GPUs it is compiled for."""

    operation: str
    formats: tuple[str, ...]
    layout: str
    capability: tuple[int, int]


class Cubin(NamedTuple):
    """A kernel's name in the machine code, and the code."""

    name: str
    code: bytes


@cache
def _versions() -> tuple[str, ...]:
    found = []
    for name in _COMPILERS:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return tuple(found)


def _path(key: Key) -> Path | None:
    from fastema.kernels.jit import SOURCE_STAMP, cache_folder

    folder = cache_folder()
    if folder is None:
        return None
    content = repr((key, SOURCE_STAMP, _versions())).encode()
    return folder / f"{key.operation}-{hashlib.sha256(content).hexdigest()[:24]}.cubin"


def _sealed(body: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(body).digest()


def _packed(made: Cubin) -> bytes:
    name = made.name.encode()
    body = len(name).to_bytes(4, "little") + name + made.code
    return _sealed(body) + body


def _unpacked(stored: bytes) -> Cubin | None:
    """The entry; None if it is not whole."""
    body = stored[_HEAD:]
    if stored[:_HEAD] != _sealed(body):
        return None
    end = 4 + int.from_bytes(body[:4], "little")
    return Cubin(body[4:end].decode(), body[end:])


def _read(path: Path) -> Cubin | None:
    try:
        return _unpacked(path.read_bytes())
    except OSError:
        return None


def _write(path: Path, made: Cubin) -> None:
    """Put an entry in its place at once; without it the next process compiles again."""
    with suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_packed(made))
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def _compile(key: Key) -> Cubin:
    try:
        from fastema.kernels import cuda

        made = cuda.compile_kernel(*key)
    except Exception as error:  # the compilers' libraries have errors of their own, of no one kind
        reason = next(iter(str(error).strip().splitlines()), "") or "no message"
        raise Unavailable(
            f"the GPU kernel {key.operation}({', '.join(key.formats)}) could not be compiled for "
            f"sm_{key.capability[0]}{key.capability[1]} ({type(error).__name__}: {reason}): "
            f"{INSTALL}"
        ) from error
    return Cubin(made.name, made.cubin)


def cubin(key: Key, compiled: Callable[[Key], Cubin] = _compile) -> Cubin:
    """The machine code of a kernel: shipped, from the disk or, where it is not there, compiled."""
    code = shipped.read(*key)
    if code is not None:
        return Cubin(shipped.entry_name(key.operation), code)
    path = _path(key)
    if path is None:
        return compiled(key)
    found = _read(path)
    if found is None:
        found = compiled(key)
        _write(path, found)
    return found
