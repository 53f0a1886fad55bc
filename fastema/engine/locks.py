"""Locks that a forked child finds open.

A thread of the parent that held one does not exist in the child, which would wait for ever.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

__all__ = ["lock", "rlock"]

_all: weakref.WeakSet[Any] = weakref.WeakSet()


def _open_in_child() -> None:
    for one in list(_all):
        one._at_fork_reinit()  # what the standard library's own locks do


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_in_child)


def lock() -> threading.Lock:
    """A lock that is open after a fork."""
    made = threading.Lock()
    _all.add(made)
    return made


def rlock() -> Any:
    """A lock that its thread may take again, open after a fork."""
    made = threading.RLock()
    _all.add(made)
    return made
