"""Kernels by (device, operation, formats, layout), compiled on first use."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from fastema.engine.locks import lock
from fastema.errors import DTypeError

__all__ = ["Kernel", "kernel"]

Kernel = Callable[[int, int, int, int], None]
"""``kernel(table, rows, numbers, control)``, see :mod:`fastema.kernels.table`."""

_FACTORIES: Final = {
    ("cpu", "lerp"): "cpu_update",
    ("cpu", "lerp_measured"): "cpu_update",
    ("cpu", "add"): "cpu_update",
    ("cpu", "copy"): "cpu_update",
    ("cpu", "give"): "cpu_update",
    ("cpu", "finite"): "cpu_update",
    ("cpu", "window"): "cpu_window",
    ("cpu", "swap"): "cpu_swap",
    ("cpu", "park"): "cpu_swap",
    ("cpu", "unpark"): "cpu_swap",
    ("cpu", "read_read_write"): "cpu_limit",
}
"""(device, operation) to the kernel module whose function of that name makes the kernels."""

_made: dict[tuple[str, str, tuple[str, ...], str], Any] = {}
_making = lock()


def kernel(device: str, operation: str, formats: tuple[str, ...], layout: str) -> Kernel:
    """The kernel for a key; the first request compiles it or loads it from disk.

    ``formats`` are those of the written side, the other side and, for a windowed mean, the ring and
    the companion.

    Raises
    ------
    DTypeError
        If there is none for the device and operation.
    """
    key = (device, operation, formats, layout)
    with _making:
        if key not in _made:
            try:
                module = _FACTORIES[device, operation]
            except KeyError:
                known = ", ".join(sorted({f"{d}/{o}" for d, o in _FACTORIES}))
                raise DTypeError(f"no kernel for {device}/{operation}; known are {known}") from None
            factory = getattr(import_module(f"fastema.kernels.{module}"), operation)
            _made[key] = factory(*formats, layout=layout)
        made: Kernel = _made[key]
        return made
