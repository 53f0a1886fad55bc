"""Memory of a device that must not be given away while launches work on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastema.layout.device_context import DeviceContext

__all__ = ["StreamTracker", "keep_for_graphs"]

_in_graphs: list[Any] = []
"""Buffers used by captured graphs; kept forever, since CUDA does not report a graph's end."""


def keep_for_graphs(*objects: Any) -> None:
    """Keep objects to the end of the process: a graph may work on them at any time."""
    _in_graphs.extend(objects)


class StreamTracker:
    """Records once with every stream what launches work on, and keeps it once it was captured.

    ``waits`` says that some of the memory cannot be recorded: who frees it has to wait for the
    device.
    """

    def __init__(self, context: DeviceContext) -> None:
        self._context = context
        self.waits = False
        self.renew()

    def renew(self) -> None:
        """Begin again, as the memory is another."""
        self._streams: set[int] = set()
        self._captured = False

    def stream(self, owners: Callable[[], Sequence[Any]], kept: Callable[[], Sequence[Any]]) -> int:
        """Handle of the current stream, for a launch that follows at once.

        ``owners`` are those of all memory that is worked on; ``kept`` is what a captured graph
        needs besides the tensors that its user keeps for it.
        """
        stream = self._context.stream()
        if self._context.capturing():  # perhaps on a stream that is known, from a call before
            if not self._captured:
                keep_for_graphs(*kept())
                self._captured = True
        elif stream not in self._streams:
            self.waits = not self._context.hold(owners())
            self._streams.add(stream)
        return stream
