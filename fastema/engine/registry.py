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

_OPERATIONS: Final = {
    *("lerp", "lerp_measured", "add", "copy", "give", "finite"),
    *("window", "swap", "park", "unpark", "read_read_write"),
}
"""What :mod:`fastema.kernels.steps` defines for every device."""

_DEVICES: Final = {"cpu": "fastema.kernels.cpu"}
"""Device to the module whose ``kernel`` compiles an operation for it."""

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
            if device not in _DEVICES or operation not in _OPERATIONS:
                known = ", ".join(sorted(f"{d}/{o}" for d in _DEVICES for o in _OPERATIONS))
                raise DTypeError(f"no kernel for {device}/{operation}; known are {known}")
            compiler = import_module(_DEVICES[device])
            _made[key] = compiler.kernel(operation, formats, layout)
        made: Kernel = _made[key]
        return made
