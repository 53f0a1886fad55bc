"""Compilation of kernels, and the cache of their machine code.

Numba's on-disk cache does not notice an edit in another file, so shared scalar maths would go stale
after an upgrade, and its default place leaves files behind an uninstall. Kernels therefore go to a
folder of our own, named by the hash of all kernel sources.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core import config
from numba.core.registry import cpu_target
from numba.core.serialize import dumps
from numba.extending import register_jitable

from fastema.kernels import scalar
from fastema.kernels.stamp import source_stamp


def _content(function: Any) -> str:
    """Sixteen hex digits that tell a closure from others of the same function."""
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    return hashlib.sha256(function.__code__.co_code + dumps(cells)).hexdigest()[:16]


def _named(function: Any) -> Any:
    """Make what a closure closes over part of its name, which its machine code is called by.

    Numba numbers the closures of a process. Two that were compiled by two processes, and come from
    the cache into a third, would be of one name, and one of them be run in place of the other.
    """
    if function.__closure__:
        function.__qualname__ += f"_{_content(function)}"
    return function


def device_fn(function: Any) -> Any:
    """Mark scalar maths for use inside kernels; the function stays plain Python outside."""
    return register_jitable(_named(function))


for _function in vars(scalar).values():
    if getattr(_function, "__module__", None) == scalar.__name__:
        device_fn(_function)

KERNEL = types.void(types.int64, types.int64, types.int64, types.int64)
"""``kernel(table, rows, numbers, control)``, see :mod:`fastema.kernels.table`."""

_cache_switch = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_cache_switch._at_fork_reinit)


SOURCE_STAMP = source_stamp()
"""Hash of the sources as imported: an upgrade under a running process changes nothing."""


def _roots() -> Iterator[Path]:
    # Numba itself reads NUMBA_CACHE_DIR at import; honour what it took.
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR) / "fastema"
    if sys.platform == "win32":
        variable, default = "LOCALAPPDATA", Path("~", "AppData", "Local")
    else:
        variable, default = "XDG_CACHE_HOME", Path("~", ".cache")
    with suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get(variable) or default).expanduser() / "fastema"
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    with suppress(OSError):  # no folder for temporary files
        yield Path(tempfile.gettempdir()) / f"fastema-{owner}"


def _private(folder: Path) -> bool:
    """Return whether only this user can write here: cache entries are code that will be run."""
    if not hasattr(os, "getuid"):
        return True
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def cache_folder() -> Path | None:
    """The first place that can be written and is ours alone; None where there is none."""
    for root in _roots():
        folder = root / SOURCE_STAMP
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if _private(root) and _private(folder):
                return folder
        except OSError:
            continue
    return None


def _entry_folder(folder: Path, function: Any) -> Path:
    """A folder for one kernel alone, of one Numba and one kind of CPU.

    Numba keeps one index for all closures of a function, and numbers their files. Two processes
    that compile different ones at a time can come to give one number to both: either would then
    load the other's machine code.
    """
    compiler = numba.__version__, cpu_target.target_context.codegen().magic_tuple()
    stamp = hashlib.sha256(repr(compiler).encode()).hexdigest()[:8]
    return folder / f"{_content(function)}-{stamp}"


@contextmanager
def _cache_directory(folder: Path) -> Iterator[None]:
    with _cache_switch:
        before = config.CACHE_DIR
        config.CACHE_DIR = str(folder)
        try:
            yield
        finally:
            config.CACHE_DIR = before


def cpu_kernel(signature: Any = KERNEL, *, nogil: bool = True) -> Callable[[Any], Any]:
    """Compile a function for the host now, or load it from the cache.

    No fast-math: every rounding is written out, so that results do not depend on the vector width.
    ``nogil=False`` is for kernels that call into Python's C interface.
    """

    def compiled(function: Any) -> Any:
        compiler = functools.partial(numba.njit, signature, nogil=nogil, error_model="numpy")
        folder = cache_folder()
        if folder is not None:
            entry = _entry_folder(folder, function)
            try:
                with _cache_directory(entry):
                    return compiler(cache=True)(_named(function))
            except Exception:  # a damaged entry raises whatever unpickling it comes upon
                shutil.rmtree(entry, ignore_errors=True)
        return compiler()(function)

    return compiled
