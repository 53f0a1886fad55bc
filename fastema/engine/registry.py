"""Kernels of the CPU by (operation, formats, layout), loaded on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastema.engine import native
from fastema.engine.locks import compiling
from fastema.errors import DTypeError
from fastema.kernels.operations import OPERATIONS

__all__ = ["Kernel", "function", "kernel"]

Kernel = Callable[[int, int, int, int], object]
"""A kernel: ``kernel(table, rows, numbers, control)``, see :mod:`fastema.kernels.table`."""

_loaded: dict[tuple[str, tuple[str, ...], str], Callable[..., int]] = {}


def kernel(operation: str, formats: tuple[str, ...], layout: str) -> Kernel:
    """Return the kernel for a key; the first request loads or compiles it.

    ``formats`` are those of the written side, the other side and, for a windowed mean, the ring and
    the residual.
    """
    if operation not in OPERATIONS:
        known = ", ".join(sorted(OPERATIONS))
        raise DTypeError(f"no kernel for {operation}; known operations: {known}")
    return _load_once(operation, formats, layout)


def function(name: str) -> Callable[..., int]:
    """Return a compiled function that does not work on pairs of tensors."""
    return _load_once(name, (), "")


def _load_once(*key: Any) -> Callable[..., int]:
    with compiling:
        if key not in _loaded:
            _loaded[key] = native.function(*key)
        return _loaded[key]
