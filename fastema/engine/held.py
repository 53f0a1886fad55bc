"""Memory of a device that must not be given away while launches work on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastema.layout.home import Home

__all__ = ["Held", "keep"]

_in_graphs: list[Any] = []
"""What captured graphs work on at every replay, of which nobody tells when they are gone."""


def keep(*objects: Any) -> None:
    """Keep objects to the end of the process: a graph may work on them at any time."""
    _in_graphs.extend(objects)


class Held:
    """What some launches work on: noted once with every stream, kept for good once captured.

    Parameters
    ----------
    home : Home

    Attributes
    ----------
    waits : bool
        Whether some of the memory cannot be noted: who lets go of it has to wait for the device.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._streams: set[int] = set()
        self._captured = False
        self.waits = False

    def stream(self, noted: Callable[[], Sequence[Any]], kept: Callable[[], Sequence[Any]]) -> int:
        """Handle of the current stream, for a launch that follows at once.

        Parameters
        ----------
        noted : callable
            The owners of all memory that is worked on.
        kept : callable
            What a captured graph needs besides the tensors that its user keeps for it.
        """
        stream = self._home.stream()
        if self._home.capturing():  # perhaps on a stream that is known, from a call before
            if not self._captured:
                keep(*kept())
                self._captured = True
        elif stream not in self._streams:
            self.waits = not self._home.hold(noted())
            self._streams.add(stream)
        return stream

    def renew(self) -> None:
        """Begin again, as the memory is another."""
        self._streams.clear()
        self._captured = False
