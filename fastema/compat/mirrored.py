"""Numbers that a peer keeps in buffers, known to the host without asking the device each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Mirrored", "is_read_at_once", "read_number"]


def is_read_at_once(buffer: Tensor) -> bool:
    """Return whether to read a number each time: reading is free, or its writes are not counted."""
    return buffer.device.type == "cpu" or buffer.is_inference()


def read_number(buffer: Tensor) -> float:
    """The number in a tensor of one element; waits for its device."""
    return buffer.item()


class Mirrored:
    """The number in a buffer of one element, read from its device only after a write.

    A buffer that was replaced (``.to()``, assigned) or written (``load_state_dict``, ``fill_``) is
    noticed by its identity and its version. On an accelerator a write through ``.data`` is not.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, float] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy belongs to another buffer."""
        return Mirrored, ()

    def read(self, buffer: Tensor) -> float:
        """The number."""
        if is_read_at_once(buffer):
            return read_number(buffer)
        if self._known is None or self._known[0] is not buffer or self._known[1] != buffer._version:
            self._known = buffer, buffer._version, read_number(buffer)
        return self._known[2]

    def write(self, buffer: Tensor, value: float) -> None:
        """Put a number into the buffer; its device is not waited for."""
        with torch.no_grad():
            buffer.fill_(value)
        if not is_read_at_once(buffer):
            self._known = buffer, buffer._version, value

    def count(self, buffer: Tensor) -> None:
        """Add 1 to it."""
        self.write(buffer, self.read(buffer) + 1)
