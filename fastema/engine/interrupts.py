"""Holding signals back while tensors are half written."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Final

__all__ = ["deferred"]

_SIGNALS: Final = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Signals whose handlers, where they are Python functions, are likely to raise, or to save."""


# The functions in C: what the signal module puts around them, to make enums, takes ten times as
# long, and an update is timed in microseconds.
_in_c: Any = sys.modules.get("_signal", signal)
_set, _get = _in_c.signal, _in_c.getsignal


_active: list[deferred] = []
"""Blocks of the main thread, the innermost last."""


def _put_back_in_child() -> None:
    # Forked by another thread, the child never comes to the end of these blocks.
    while _active:
        _active.pop()._put_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_put_back_in_child)


class deferred:
    """A block that Ctrl-C, and signal handlers that raise, wait for.

    Python runs its handlers between any two instructions of the main thread, so an exception may
    come up between two halves of a swap. Here they are noted, and called when the block is over.
    Costs about a microsecond in the main thread, next to nothing in others.
    """

    __slots__ = ("_before", "_noted")

    def __init__(self) -> None:
        self._before: list[tuple[int, Any]] = []
        self._noted: list[tuple[int, FrameType | None]] = []

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append((number, frame))

    def _put_back(self) -> None:
        for number, handler in self._before:
            _set(number, handler)

    def __enter__(self) -> None:
        """Begin to hold signals back."""
        if threading.current_thread() is not threading.main_thread():
            return
        _active.append(self)
        try:
            for number in _SIGNALS:
                handler = _get(number)
                if callable(handler):
                    self._before.append((number, handler))
                    _set(number, self._note)
        except BaseException:
            _active.remove(self)
            self._put_back()
            raise

    def __exit__(self, *_: object) -> None:
        """Let them through: what was noted is handled now."""
        if self not in _active:
            return
        _active.remove(self)
        try:
            self._put_back()
        except BaseException:  # one that came as soon as it could
            self._put_back()
            raise
        handlers = dict(self._before)
        for number, frame in self._noted:
            handlers[number](number, frame)
