"""Locks across a fork.

The thread that held a lock in the parent does not exist in the child, which would wait forever. So
:func:`lock` and :func:`rlock` return locks that are released in the child, and a fork waits until
no thread holds :data:`compiling`: the compilers have locks of their own, which nobody releases, and
half a compilation is of no use to the child.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import Any, Final

__all__ = ["compiling", "lock", "rlock"]

_all: weakref.WeakSet[Any] = weakref.WeakSet()

compiling: Final = threading.RLock()
"""Held while kernels are loaded or compiled. Reentrant: a signal handler may fork in the middle."""

_held_over_fork: Final[dict[int, list[Any]]] = {}
"""Locks by the thread that is forking."""


def _wait_for_compilers() -> None:
    # Numba's own lock too, if Numba is loaded: another library may be compiling. llvmlite's lock,
    # which is private, is held for single calls, and for longer ones only by these compilers.
    held = _held_over_fork.setdefault(threading.get_ident(), [])
    numba = sys.modules.get("numba.core.compiler_lock")
    for one in (compiling, getattr(numba, "global_compiler_lock", None)):
        if one is not None:
            one.acquire()
            held.append(one)


def _resume_compilers() -> None:
    for one in reversed(_held_over_fork.pop(threading.get_ident(), [])):
        one.release()


def _release_in_child() -> None:
    _resume_compilers()  # the thread that forked holds them, and is the child's only one
    _held_over_fork.clear()
    for one in list(_all):
        one._at_fork_reinit()  # as the standard library does for its own locks


# At the first import of the engine: functions registered later are called before these, and may
# wait for threads that compile.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_wait_for_compilers,
        after_in_parent=_resume_compilers,
        after_in_child=_release_in_child,
    )


def lock() -> threading.Lock:
    """Return a lock that is released in a forked child."""
    made = threading.Lock()
    _all.add(made)
    return made


def rlock() -> Any:
    """Return a reentrant lock that is released in a forked child."""
    made = threading.RLock()
    _all.add(made)
    return made
