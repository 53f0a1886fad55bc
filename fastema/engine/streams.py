"""Keeping device memory from being reused while launches work on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastema.layout.device_context import DeviceContext

__all__ = ["StreamTracker", "keep_for_graphs"]

_in_graphs: list[Any] = []
"""Buffers of captured graphs; kept forever, since CUDA does not report a graph's destruction."""


def keep_for_graphs(*objects: Any) -> None:
    """Keep objects until the process ends: a captured graph may use them at any time."""
    _in_graphs.extend(objects)


class StreamTracker:
    """Records the memory of launches once with every stream, and keeps captured memory forever.

    ``needs_wait`` is True if some of the memory cannot be recorded: then wait for the device before
    freeing the memory.
    """

    def __init__(self, context: DeviceContext) -> None:
        self._context = context
        self.needs_wait = False
        self.forget_streams()

    def forget_streams(self) -> None:
        """Forget all streams, because the memory has changed."""
        self._streams: set[int] = set()
        self._captured = False

    def stream(self, owners: Callable[[], Sequence[Any]], kept: Callable[[], Sequence[Any]]) -> int:
        """Return the handle of the current stream, for a launch that follows immediately.

        ``owners`` returns the owners of all memory that the launch uses. ``kept`` returns what a
        captured graph needs besides the tensors that its user keeps alive.
        """
        stream = self._context.stream()
        if self._context.capturing():  # the stream may be known from an earlier call
            if not self._captured:
                keep_for_graphs(*kept())
                self._captured = True
        elif stream not in self._streams:
            self.needs_wait = not self._context.defer_reuse(owners())
            self._streams.add(stream)
        return stream
