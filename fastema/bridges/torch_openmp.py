"""The OpenMP that PyTorch is linked with."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch

_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")


@cache
def openmp() -> tuple[int, int] | None:
    """Return the addresses of two C functions; None if PyTorch has no OpenMP, or another ABI.

    They are ``GOMP_parallel`` of its OpenMP and ``at::get_num_threads``, which applies
    ``torch.set_num_threads`` to a new thread before it returns the number.
    """
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{_SUFFIX}"
    try:
        library = ctypes.CDLL(str(path))  # loaded already; its dependencies are searched too
        functions = library.GOMP_parallel, library._ZN2at15get_num_threadsEv
    except (OSError, AttributeError):
        return None
    parallel, size = (ctypes.cast(one, ctypes.c_void_p).value for one in functions)
    return None if parallel is None or size is None else (parallel, size)
