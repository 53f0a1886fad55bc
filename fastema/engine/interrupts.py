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

_active: list[defer_signals] = []
"""The outermost :class:`defer_signals` of the main thread, while there is one."""

_handlers: dict[int, Any] = {}
"""Handlers, by signal, that :func:`_record_signal` replaces now or replaced before."""


def _record_signal(number: int, frame: FrameType | None) -> None:
    if _active:
        _active[0].pending.append((number, frame))
    else:  # reinstalled after the block, by code that saved it inside
        _handlers[number](number, frame)


class defer_signals:
    """A ``with`` block that defers Ctrl-C, and signal handlers that raise, until it ends.

    Python runs signal handlers between any two instructions of the main thread, so an exception
    may arise between the two halves of a swap. This block records signals and calls their handlers
    on exit: all of them, even if one raises. It costs about a microsecond in the main thread, next
    to nothing in other threads or inside another block.

    Signals without a handler in Python are left alone. For the others ``signal.signal`` is called,
    which removes what was set in C besides: a ``faulthandler.register(..., chain=True)`` of the
    same signal, and ``signal.siginterrupt(..., False)``.
    """

    __slots__ = ("_deferred", "pending")

    _deferred: list[int]
    pending: list[tuple[int, FrameType | None]]

    def __enter__(self) -> None:
        """Start deferring signals."""
        if _active or get_ident() != main_thread().ident:
            return
        self._deferred, self.pending = [], []
        try:
            _active.append(self)
            for number in _SIGNALS:
                handler = _get(number)
                if handler is _record_signal:  # reinstalled by code that saved it inside a block
                    self._deferred.append(number)
                elif callable(handler):
                    _handlers[number] = handler
                    self._deferred.append(number)
                    before = _set(number, _record_signal)
                    if before is not handler:  # a signal came, and its handler installed another
                        _handlers[number] = before
        except BaseException:
            # No call before this one: a second signal's handler could raise as it begins, and a
            # block that stays in the list defers signals forever.
            _active.remove(self)
            self._release()
            raise

    def __exit__(self, *_: object) -> None:
        """Stop deferring, and call the handlers of the recorded signals."""
        if self in _active:
            _active.remove(self)
            self._release()

    def _restore_handlers(self) -> None:
        for number in self._deferred:
            if _get(number) is _record_signal:  # not a handler that was set inside
                _set(number, _handlers[number])

    def _release(self) -> None:
        try:
            self._restore_handlers()
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


def _restore_handlers_in_child() -> None:
    # In a child that another thread forked, these blocks never end.
    while _active:
        _active.pop()._restore_handlers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_handlers_in_child)
