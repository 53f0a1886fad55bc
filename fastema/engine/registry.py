"""Kernels of the CPU by (operation, formats, layout), compiled on first use."""

from __future__ import annotations

from collections.abc import Callable

from fastema.engine.locks import lock
from fastema.errors import DTypeError
from fastema.kernels.operations import OPERATIONS

__all__ = ["Kernel", "kernel"]

Kernel = Callable[[int, int, int, int], None]
"""``kernel(table, rows, numbers, control)``, see :mod:`fastema.kernels.table`."""

_made: dict[tuple[str, tuple[str, ...], str], Kernel] = {}
_making = lock()


def kernel(operation: str, formats: tuple[str, ...], layout: str) -> Kernel:
    """The kernel for a key; the first request compiles it or loads it from disk.

    ``formats`` are those of the written side, the other side and, for a windowed mean, the ring and
    the companion.
    """
    key = operation, formats, layout
    with _making:
        if key not in _made:
            if operation not in OPERATIONS:
                known = ", ".join(sorted(OPERATIONS))
                raise DTypeError(f"no kernel for {operation}; known are {known}")
            from fastema.kernels import cpu

            _made[key] = cpu.kernel(*key)
        return _made[key]
