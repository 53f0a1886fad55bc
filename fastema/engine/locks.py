"""Locks that are released in a forked child.

The thread that held a lock in the parent does not exist in the child, which would wait forever.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

__all__ = ["lock", "rlock"]

_all: weakref.WeakSet[Any] = weakref.WeakSet()


def _release_in_child() -> None:
    for one in list(_all):
        one._at_fork_reinit()  # as the standard library does for its own locks


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


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
