"""The latest pairs of lists that were worked on, remembered without keeping a tensor alive."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, Final
from weakref import ref

from fastema.binding.binding import Binding
from fastema.bridges.registry import write_listeners
from fastema.engine.cpu import CpuRun
from fastema.engine.interrupts import defer_signals
from fastema.engine.locks import rlock
from fastema.layout.device_context import LaunchArgs
from fastema.layout.spec import Leaves

__all__ = ["RecentRuns"]

_MOST: Final = 16
"""Pairs of lists that are remembered, by tables of a few hundred bytes per tensor."""

_Key = tuple[int, int, int, int]


class _Entry:
    """A native run over tensors that it knows by weak references and addresses.

    Its checks look at the tensors' objects: compare :meth:`is_for` first.
    """

    def __init__(
        self, tensors: Sequence[Any], run: CpuRun, tables: Any, notify: Callable[[Any], None]
    ) -> None:
        self._tensors = [ref(one) for one in tensors]
        self._tables = tables  # the run stores their addresses
        self.run, self.notify = run, notify

    def is_dead(self) -> bool:
        return any(one() is None for one in self._tensors)

    def is_for(self, tensors: Sequence[Any]) -> bool:
        found = [one() for one in self._tensors]
        return len(found) == len(tensors) and all(map(is_, found, tensors))


class RecentRuns:
    """Runs one operation again on two lists of tensors that it has met before.

    ``writes_both`` says whether it writes to the second list as well.
    """

    def __init__(self, *, writes_both: bool) -> None:
        self._lock, self._writes_both = rlock(), writes_both
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()

    def step(self, dst: Any, src: Any, weight: float) -> bool:
        """Run the operation in one native call; return False if it has not met these lists."""
        if not _are_lists(dst, src):
            return False
        with self._lock:
            entry = self._entries.get(_key_of(dst, src))
            both = dst + src
            if entry is None or not entry.is_for(both):
                return False
            if not entry.run.repeat(weight, 0):
                return False
            entry.notify(both if self._writes_both else dst)
            return True

    def remember(self, dst: Any, src: Any, binding: Binding, operations: Mapping[str, str]) -> None:
        """Remember the lists of a binding, if compiled code alone can check their tensors."""
        if not _are_lists(dst, src):
            return
        ours, theirs = binding.watched
        tables, steady = binding.check_tables, binding.begin_steady(operations)
        if steady is None or None in tables or not (_holds(ours, dst) and _holds(theirs, src)):
            return
        listeners = write_listeners(dst + src)
        if len(listeners) != 1:
            return
        with defer_signals():
            steady.run.set_steps([LaunchArgs()], repeat=True)
        entry = _Entry(dst + src, steady.run, tables, listeners[0][0])
        with self._lock:
            # Tables of freed tensors would take as much memory as small tensors do.
            for key in [key for key, one in self._entries.items() if one.is_dead()]:
                del self._entries[key]
            self._entries[_key_of(dst, src)] = entry
            if len(self._entries) > _MOST:
                self._entries.popitem(last=False)


def _are_lists(dst: Any, src: Any) -> bool:
    return type(dst) is list and type(src) is list and bool(dst and src)


def _holds(leaves: Leaves, members: Sequence[Any]) -> bool:
    """Return whether the leaves are the members of a list themselves."""
    tensors = [leaf.spec.tensor for leaf in leaves.items]
    return len(tensors) == len(members) and all(map(is_, tensors, members))


def _key_of(dst: Sequence[Any], src: Sequence[Any]) -> _Key:
    return id(dst[0]), id(src[0]), len(dst), len(src)
