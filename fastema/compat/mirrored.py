"""Numbers that a peer keeps in device buffers, mirrored on the host to avoid a read per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["MirroredNumber", "is_always_read", "read_number"]


def is_always_read(buffer: Tensor) -> bool:
    """Return whether to read the buffer each time: reads are free, or torch counts no writes."""
    return buffer.device.type == "cpu" or buffer.is_inference()


def read_number(buffer: Tensor) -> float:
    """Return the number in a one-element tensor; wait for its device."""
    return buffer.item()


class MirroredNumber:
    """The number in a one-element buffer, read from its device only after a write.

    The buffer's identity and version show that it was replaced (``.to()``, assignment) or written
    (``load_state_dict``, ``fill_``). On an accelerator, a write through ``.data`` goes unnoticed.
    """

    def __init__(self) -> None:
        self._last_read: tuple[Tensor, int, float] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy it as an empty mirror: a copy belongs to another buffer."""
        return MirroredNumber, ()

    def read(self, buffer: Tensor) -> float:
        """Return the number in the buffer."""
        if is_always_read(buffer):
            return read_number(buffer)
        if (
            self._last_read is None
            or self._last_read[0] is not buffer
            or self._last_read[1] != buffer._version
        ):
            self._last_read = buffer, buffer._version, read_number(buffer)
        return self._last_read[2]

    def write(self, buffer: Tensor, value: float) -> None:
        """Write a number into the buffer, without waiting for its device."""
        with torch.no_grad():
            buffer.fill_(value)
        if not is_always_read(buffer):
            self._last_read = buffer, buffer._version, value

    def increment(self, buffer: Tensor) -> None:
        """Add 1 to the number in the buffer."""
        self.write(buffer, self.read(buffer) + 1)
