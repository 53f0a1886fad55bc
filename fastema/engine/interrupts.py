"""Deferring signals while tensors are half written."""

from __future__ import annotations

import ctypes
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


class _Action(ctypes.Structure):
    """``struct sigaction`` of Linux: the action for a signal."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


# Without declared argument types a call takes half the time. The structure of other systems is
# unknown: there only Python's handlers are restored.
_sigaction: Any = ctypes.PyDLL(None)["sigaction"] if sys.platform == "linux" else lambda *_: 0
_actions: Final = {number: _Action() for number in _SIGNALS}
_references: Final = {number: ctypes.byref(action) for number, action in _actions.items()}

_of_python: tuple[int | None, int] | None = None
"""Function and flags of an action that Python alone has set; None until the first one."""

_active: list[defer_signals] = []
"""The outermost :class:`defer_signals` of the main thread, while there is one."""

_handlers: dict[int, Any] = {}
"""Handlers, by signal, that :func:`_record_signal` replaces now or replaced before."""

_changed_in_c: set[int] = set()
"""Signals whose action is not the one that Python alone would set."""


def _record_signal(number: int, frame: FrameType | None) -> None:
    if _active:
        _active[0].pending.append((number, frame))
    else:  # reinstalled after the block, by code that saved it inside
        _handlers[number](number, frame)


def _reinstall_action(number: int) -> None:
    """Undo what ``signal.signal`` did besides setting Python's handler.

    It removes handlers set in C, such as those of ``faulthandler``, which call Python's handler
    last, and the settings of ``signal.siginterrupt``.
    """
    global _of_python
    if _of_python is None:
        now = _Action()
        _sigaction(number, None, ctypes.byref(now))
        _of_python = now.function, now.flags
    action = _actions[number]
    if (action.function, action.flags) != _of_python:
        _changed_in_c.add(number)
        _sigaction(number, _references[number], None)


class defer_signals:
    """A ``with`` block that defers Ctrl-C, and signal handlers that raise, until it ends.

    Python runs signal handlers between any two instructions of the main thread, so an exception
    may arise between the two halves of a swap. This block records signals and calls their handlers
    on exit: all of them, even if one raises. Handlers set in C run at once and stay installed. It
    costs one or two microseconds in the main thread, next to nothing in other threads or inside
    another block.
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
                if handler is _record_signal:  # left by a block that was interrupted on exit
                    self._deferred.append(number)
                elif callable(handler):
                    _sigaction(number, None, _references[number])
                    action = _actions[number]
                    found = action.function, action.flags
                    _handlers[number] = handler
                    self._deferred.append(number)
                    before = _set(number, _record_signal)
                    if before is not handler:  # a signal came, and its handler installed another
                        _handlers[number] = before
                    if found != _of_python:
                        _reinstall_action(number)
        except BaseException:
            # No call before this one: a second signal's handler could raise as it begins, and a
            # block that stays in the list defers signals forever.
            _active.remove(self)
            self._release()
            raise

    def __exit__(self, *_: object) -> None:
        """Stop deferring, and call the handlers of the recorded signals."""
        if self in _active:
            try:
                _active.remove(self)
            finally:
                self._release()

    def _restore_handlers(self) -> None:
        for number in self._deferred:
            if _get(number) is _record_signal:  # not a handler that was set inside
                _set(number, _handlers[number])
                if number in _changed_in_c:
                    _sigaction(number, _references[number], None)

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
