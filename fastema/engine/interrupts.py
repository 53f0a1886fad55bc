"""Deferring signals while tensors are half written."""

from __future__ import annotations

import os
import signal
import sys
from threading import get_ident, main_thread
from types import FrameType
from typing import Any, Final

__all__ = ["defer_signals"]

_SIGNALS: Final = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Signals whose handlers, if written in Python, are likely to raise or to save a checkpoint."""


# Call the C functions: the signal module's wrappers, which build enums, take ten times as long, and
# an update is timed in microseconds.
_in_c: Any = sys.modules.get("_signal", signal)
_set, _get = _in_c.signal, _in_c.getsignal

_outermost: defer_signals | None = None
"""The block that records the main thread's signals, if there is one."""

_handlers: dict[int, Any] = {}
"""Handlers, by signal, that :func:`_record_signal` replaces now or replaced before."""


def _record_signal(number: int, frame: FrameType | None) -> None:
    if _outermost is not None:
        _outermost.pending.append((number, frame))
    else:  # reinstalled after the block, by code that saved it inside
        _handlers[number](number, frame)


class defer_signals:
    """A ``with`` block that defers Ctrl-C, and signal handlers that raise, until it ends.

    Python runs signal handlers between any two instructions of the main thread, so an exception
    may arise between the two halves of a swap. This block records signals and calls their handlers
    on exit: all of them, even if one raises. It costs about a microsecond in the main thread, next
    to nothing in other threads or inside another block.

    Signals without a handler in Python are left alone. The others are set with ``signal.signal``,
    which also removes settings made in C: ``faulthandler.register(..., chain=True)`` of the same
    signal, and ``signal.siginterrupt(..., False)``.
    """

    __slots__ = ("pending",)

    pending: list[tuple[int, FrameType | None]]

    def __enter__(self) -> None:
        """Start deferring signals."""
        global _outermost
        if _outermost is not None or get_ident() != main_thread().ident:
            return
        self.pending = []
        try:
            _outermost = self
            for number in _SIGNALS:
                handler = _get(number)
                if callable(handler) and handler is not _record_signal:
                    _handlers[number] = handler  # known even if the next line is interrupted
                    _handlers[number] = _set(number, _record_signal)
        except BaseException:
            # No call before this: a second signal's handler could raise as it begins, and signals
            # would be deferred forever.
            _outermost = None
            self._release()
            raise

    def __exit__(self, *_: object) -> None:
        """Stop deferring, and call the handlers of the recorded signals."""
        if _outermost is self:
            self._release()

    def _release(self) -> None:
        global _outermost
        try:
            _outermost = None
            for number in [*_handlers]:
                if _get(number) is _record_signal:  # not a handler that was set inside
                    _set(number, _handlers[number])
            while self.pending:
                number, frame = self.pending[0]
                handler = _get(number)
                wanted = callable(handler)
                del self.pending[0]  # no signal can be handled between here and the call
                if wanted:
                    handler(number, frame)
        except BaseException:  # a handler raised: call the others first
            self._release()
            raise


def _release_in_child() -> None:
    # If another thread forked, the block never ends in the child. Its signals are the parent's.
    if _outermost is not None:
        _outermost.pending.clear()
        _outermost._release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
