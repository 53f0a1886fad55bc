"""Kernels by (device, operation, written format, other format, layout), compiled on first use."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from fastema.engine.locks import lock
from fastema.errors import DTypeError

__all__ = ["Kernel", "kernel"]

Kernel = Callable[[int, int, int, int], None]
"""``kernel(table, rows, scalars, cursor)``, see :mod:`fastema.kernels.table`."""

_FACTORIES: Final = {
    ("cpu", "lerp"): "cpu_update",
    ("cpu", "copy"): "cpu_update",
    ("cpu", "swap"): "cpu_swap",
    ("cpu", "park"): "cpu_swap",
    ("cpu", "unpark"): "cpu_swap",
    ("cpu", "read_read_write"): "cpu_limit",
}
"""(device, operation) to the kernel module whose function of that name makes the kernels."""

_made: dict[tuple[str, str, str, str, str], Any] = {}
_making = lock()


def kernel(device: str, operation: str, dst: str, src: str, layout: str) -> Kernel:
    """The kernel for a key; the first request compiles it or loads it from disk.

    Raises
    ------
    DTypeError
        If there is none for the device and operation.
    """
    key = (device, operation, dst, src, layout)
    with _making:
        if key not in _made:
            try:
                module = _FACTORIES[device, operation]
            except KeyError:
                known = ", ".join(sorted({f"{d}/{o}" for d, o in _FACTORIES}))
                raise DTypeError(f"no kernel for {device}/{operation}; known are {known}") from None
            factory = getattr(import_module(f"fastema.kernels.{module}"), operation)
            _made[key] = factory(dst, src, layout)
        made: Kernel = _made[key]
        return made
