"""Detecting that tensors are no longer where a table says they are."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from operator import is_
from typing import Any, Final

import numpy as np

from fastema.engine.registry import function
from fastema.errors import FastemaError
from fastema.kernels import watch_table as abi
from fastema.layout.spec import Attributes, Leaves, TensorContainer, TensorSpec

__all__ = ["Watch", "watch"]


class Watch(ABC):
    """Remembers the tensors of a container and where they are in memory.

    :meth:`changed` is what the compiled checks of :attr:`tasks` and :attr:`checks` find together.
    """

    tasks: Sequence[int] = ()
    """Addresses of the tasks of compiled checks (:mod:`fastema.kernels.watch_table`)."""

    roots: Sequence[tuple[Any, Any]] = ()
    """Objects, with the ``__dict__`` that compiled checks read in their place: both must agree."""

    tables: Any = None
    """What the tasks point to, without the tensors' objects, which they know by address."""

    def __init__(self, held: Sequence[TensorContainer], transient: bool) -> None:
        self._transient = transient
        self._containers = [(one, _members(one, transient)) for one in held]

    @abstractmethod
    def changed(self) -> bool:
        """Return whether any tensor moved, changed shape or dtype, or was replaced."""

    @property
    def checks(self) -> list[Callable[[], bool]]:
        """The checks that are not compiled."""
        return [self._replaced] if self._containers else []

    def _replaced(self) -> bool:
        """Return whether any container holds other objects than before."""
        for one, members in self._containers:
            now = _members(one, self._transient)
            if len(now) != len(members) or not all(map(is_, now, members)):
                return True
        return False


def _members(held: TensorContainer, transient: bool) -> list[Any]:
    """Return the objects that must stay: selected values, keys and values, or elements."""
    container, keys, loose = held
    if keys is not None:
        values = container.values if isinstance(container, Attributes) else container
        return [*map(values.get, keys)]
    if not isinstance(container, Mapping):
        return list(container)
    if transient or not loose:
        return [part for entry in container.items() for part in entry]
    return [
        part for key, value in container.items() for part in (key, None if key in loose else value)
    ]


def _open(held: TensorContainer) -> TensorContainer:
    """Return the same container with the attributes of an object in a dict, which keeps them."""
    container = held.container
    return held._replace(container=container.values) if isinstance(container, Attributes) else held


class _Wrapped:
    """Iterates over the tensors that wrappers currently hold, in the order of their specs."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._wrappers = [(spec.unwrap, spec.owner) for spec in specs if spec.unwrap is not None]

    def __iter__(self) -> Iterator[Any]:
        return iter([unwrap(owner) for unwrap, owner in self._wrappers])


_Fingerprint = Callable[[Any], object]


def _seen(spec: TensorSpec, describe: _Fingerprint) -> tuple[Any, _Fingerprint, object]:
    """Return a tensor, its fingerprint function, and its current fingerprint."""
    if spec.fingerprint is None:
        return spec.owner, describe, spec
    return spec.owner, spec.fingerprint, spec.fingerprint(spec.owner)


def _differs(owner: Any, look: _Fingerprint, seen: object) -> bool:
    try:
        return look(owner) != seen
    except FastemaError:  # no longer describable: locating it again raises the reason
        return True


class _DescribingWatch(Watch):
    """Describes every tensor again: one to several microseconds each, for any framework."""

    def __init__(self, leaves: Leaves, transient: bool = True) -> None:
        super().__init__(leaves.held, transient)
        # If the framework has no cheaper fingerprint, compare whole descriptions.
        self._seen = [_seen(leaf.spec, leaves.describe) for leaf in leaves.items]

    @property
    def checks(self) -> list[Callable[[], bool]]:
        """See :class:`Watch`."""
        return [self.changed]

    def changed(self) -> bool:
        """See :class:`Watch`."""
        return self._replaced() or any(_differs(*one) for one in self._seen)


def _c_address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_ANY: Final = object()
"""Placeholder for an object that may be replaced."""


_dict_next = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
)(("PyDict_Next", ctypes.pythonapi))


class _DictPositions:
    """Finds dict entries by position with ``PyDict_Next``, in half the time of a lookup."""

    def __init__(self) -> None:
        self._position, self._key = ctypes.c_ssize_t(), ctypes.py_object()
        self._known: dict[Any, int] = {}

    def find(self, container: dict[Any, Any], key: Any) -> tuple[int, Any]:
        """Return the position of an existing key, and the key object that the dict holds."""
        # Most modules have a key at the same position as the module before.
        for place in (self._known.get(key, 0), 0):
            self._position.value = place
            while _dict_next(
                container, ctypes.byref(self._position), ctypes.byref(self._key), None
            ):
                if self._key.value == key:
                    self._known[key] = place
                    return place, self._key.value
                place = self._position.value
        raise KeyError(key)


def _dict_tables(
    held: Sequence[TensorContainer], transient: bool
) -> tuple[list[tuple[int, ...]], list[Any]]:
    """Return the rows of the table of dicts, and keys and objects of all entries, alternating."""
    rows: list[tuple[int, ...]] = []
    entries: list[Any] = []
    places = _DictPositions()
    for container, keys, loose in held:
        first = len(entries) // 2
        if keys is None:
            rows.append((id(container), 0, len(container), first, 1))
            for key, value in container.items():
                entries += (key, _ANY if key in loose and not transient else value)
            continue
        for k, name in enumerate(keys):
            place, key = places.find(container, name)
            rows.append((id(container), place, 1, first + k, 0))
            entries += (key, container[key])
    return rows, entries


class _CompiledWatch(Watch):
    """Checks all tensors in one compiled loop, with the framework's DLPack exchange function."""

    def __init__(self, leaves: Leaves, transient: bool = True, keep: bool = False) -> None:
        self._check = function("check_tensors")
        held = [_open(one) for one in leaves.held] if keep else leaves.held
        self.roots = [
            (one.container.owner, other.container)
            for one, other in zip(leaves.held, held, strict=True)
            if one is not other
        ]
        dicts = [one for one in held if type(one.container) is dict]
        others = [one for one in held if type(one.container) is not dict]
        wrapped = [leaf.spec for leaf in leaves.items if leaf.spec.unwrap is not None]
        if wrapped:
            others.append(TensorContainer(_Wrapped(wrapped)))
        super().__init__(others, transient)
        rows, entries = _dict_tables(dicts, transient)
        dict_rows = np.array(rows, np.int64).reshape(-1, abi.DICT)
        entry = np.array([0 if one is _ANY else id(one) for one in entries], np.int64)
        scratch = np.zeros(abi.SCRATCH_WORDS, np.int64)
        ranks = [len(leaf.spec.shape) for leaf in leaves.items]
        firsts = [0, *accumulate(2 * rank for rank in ranks)]
        tensor = np.zeros((len(ranks), abi.TENSOR), np.int64)
        owners = [leaf.spec.tensor for leaf in leaves.items]
        tensor[:, 0] = [id(owner) for owner in owners]
        tensor[:, 3], tensor[:, 4] = ranks, firsts[:-1]
        dims = np.zeros(firsts[-1], np.int64)
        # Every object whose address is stored must outlive this watch.
        containers = [one.container for one in dicts]
        self._owners = containers, entries, owners
        task = np.zeros(abi.WORDS, np.int64)
        task[abi.DICT_NEXT] = _c_address(ctypes.pythonapi.PyDict_Next)
        task[abi.DESCRIBE] = leaves.items[0].spec.exchange
        task[abi.CLEAR_ERROR] = _c_address(ctypes.pythonapi.PyErr_Clear)
        task[abi.ENTRIES_AT], task[abi.DIMS_AT] = entry.ctypes.data, dims.ctypes.data
        task[abi.SCRATCH_AT] = scratch.ctypes.data
        task[abi.TENSORS], task[abi.TENSORS_AT] = len(tensor), tensor.ctypes.data
        task[abi.RECORD] = 1
        # A tensor that cannot be described any more has changed: the first check reports it.
        self._check(task.ctypes.data)
        task[abi.RECORD] = 0
        task[abi.DICTS], task[abi.DICTS_AT] = len(dict_rows), dict_rows.ctypes.data
        self.tables = task, dict_rows, entry, tensor, dims, scratch
        self.tasks = [task.ctypes.data]

    def changed(self) -> bool:
        """See :class:`Watch`."""
        for root, attributes in self.roots:
            if root.__dict__ is not attributes:
                return True
        return bool(self._check(self.tasks[0])) or (bool(self._containers) and self._replaced())


def watch(leaves: Leaves, *, transient: bool = True, keep: bool = False) -> Watch:
    """Start watching the tensors of a container, which ``leaves`` describes.

    Pass ``transient=False`` if tensors outside of a module's state dict may change; ``leaves`` must
    not have them. Pass ``keep=True`` if the caller keeps the container alive: then its own
    attributes are checked in the compiled loop, too. With an exchange function (torch >= 2.10) a
    check takes about 50 ns per tensor.
    """
    exchanges = {leaf.spec.exchange for leaf in leaves.items}
    # The exchange function does not distinguish a conjugated view from a plain tensor.
    plain = all(leaf.spec.kind.parts == 1 for leaf in leaves.items)
    compiled = plain and len(exchanges) == 1 and 0 not in exchanges
    if compiled:
        return _CompiledWatch(leaves, transient, keep)
    return _DescribingWatch(leaves, transient)
