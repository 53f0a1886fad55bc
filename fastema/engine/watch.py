"""Noticing that tensors are no longer where a table says they are."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fastema.errors import FastemaError
from fastema.layout.spec import Leaves, TensorSpec

__all__ = ["SHARES", "Watch", "watch"]

SHARES: Final = 16
"""Parts of a container that may be looked at in turn."""


class Watch(Protocol):
    """Remembers where the tensors of a container lie."""

    def changed(self) -> bool:
        """Whether any tensor moved, changed shape or dtype, or was replaced."""

    def changed_in(self, share: int) -> bool:
        """The same of one share of :data:`SHARES`, from 0."""


def _members(container: Any) -> list[Any]:
    """Keys and values of a mapping, or a list's elements."""
    if isinstance(container, Mapping):
        return [part for entry in container.items() for part in entry]
    return list(container)


class _Members:
    """Containers whose members must stay the same objects."""

    def __init__(self, containers: Sequence[Any]) -> None:
        self._containers = containers
        self._members = [_members(one) for one in containers]

    def changed(self) -> bool:
        for container, members in zip(self._containers, self._members, strict=True):
            now = _members(container)
            if len(now) != len(members) or not all(map(is_, now, members)):
                return True
        return False


class _ByAttributes:
    """Looks at every tensor again: about a microsecond each, or several, for any framework."""

    def __init__(self, leaves: Leaves) -> None:
        self._held = _Members(leaves.held)
        # Of a framework that has no quicker glance, the whole description.
        self._seen = [_seen(leaf.spec, leaves.describe) for leaf in leaves.items]

    def changed(self) -> bool:
        return self._held.changed() or any(_moved(*one) for one in self._seen)

    def changed_in(self, share: int) -> bool:
        if not share and self._held.changed():
            return True
        begin, end = _bounds(len(self._seen), share)
        return any(_moved(*one) for one in self._seen[begin:end])


_Glance = Callable[[Any], object]


def _seen(spec: TensorSpec, describe: _Glance) -> tuple[Any, _Glance, object]:
    """A tensor, how it is looked at, and what was seen."""
    if spec.glance is None:
        return spec.owner, describe, spec
    return spec.owner, spec.glance, spec.glance(spec.owner)


def _bounds(count: int, share: int) -> tuple[int, int]:
    return count * share // SHARES, count * (share + 1) // SHARES


def _moved(owner: Any, look: _Glance, seen: object) -> bool:
    try:
        return look(owner) != seen
    except FastemaError:  # it cannot be described any more: whoever looks again says why
        return True


def _c_address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class _ByExchange:
    """The same in one compiled loop, through the framework's DLPack exchange function."""

    def __init__(self, leaves: Leaves) -> None:
        from fastema.kernels import cpu_watch

        self._check = cpu_watch.any_change
        held = [one for one in leaves.held if type(one) is dict]
        self._others = _Members([one for one in leaves.held if type(one) is not dict])
        scratch = np.zeros(cpu_watch.SCRATCH_WORDS, np.int64)
        held_entries = [list(one.items()) for one in held]
        firsts = np.cumsum([0, *map(len, held_entries)]).tolist()
        dicts = _table(
            [
                (id(one), len(members), first)
                for one, members, first in zip(held, held_entries, firsts, strict=False)
            ],
            cpu_watch.DICT,
        )
        entries = _table(
            [(id(key), id(value)) for members in held_entries for key, value in members],
            cpu_watch.ENTRY,
        )
        rows, dims = self._snapshot(leaves, scratch)
        tensors = _table(rows, cpu_watch.TENSOR)
        # Everything whose address is noted must outlive this.
        self._kept = (leaves, held_entries, dicts, entries, tensors, dims, scratch)
        functions = (
            _c_address(ctypes.pythonapi.PyDict_Next),
            leaves.items[0].spec.exchange,
            _c_address(ctypes.pythonapi.PyErr_Clear),
        )

        def args(held: NDArray[np.int64], found: NDArray[np.int64]) -> tuple[int, ...]:
            return (
                *(held.ctypes.data, len(held), entries.ctypes.data),
                *(found.ctypes.data, len(found), dims.ctypes.data),
                *(*functions, scratch.ctypes.data),
            )

        self._args = args(dicts, tensors)
        self._shares = [
            args(dicts[slice(*_bounds(len(dicts), k))], tensors[slice(*_bounds(len(tensors), k))])
            for k in range(SHARES)
        ]

    @staticmethod
    def _snapshot(
        leaves: Leaves, scratch: NDArray[np.int64]
    ) -> tuple[list[tuple[int, ...]], NDArray[np.int64]]:
        prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)
        describe = prototype(leaves.items[0].spec.exchange)
        rows: list[tuple[int, ...]] = []
        dims: list[int] = []
        for leaf in leaves.items:
            spec = leaf.spec
            describe(spec.owner, scratch.ctypes.data)
            data, device, rank_dtype, _, _, offset = scratch.tolist()
            rows.append((id(spec.owner), data, device, rank_dtype, len(dims), offset))
            for extent, stride in zip(spec.shape, spec.strides, strict=True):
                dims += (extent, stride)
        return rows, np.array(dims, np.int64)

    def changed(self) -> bool:
        return bool(self._check(*self._args)) or self._others.changed()

    def changed_in(self, share: int) -> bool:
        if not share and self._others.changed():
            return True
        return bool(self._check(*self._shares[share]))


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> NDArray[np.int64]:
    return np.array(rows, np.int64).reshape(-1, columns)


def watch(leaves: Leaves) -> Watch:
    """Begin to watch the tensors of a container.

    They must be as ``leaves`` describes them. With an exchange function (torch from 2.10) the check
    costs about 40 nanoseconds per tensor.
    """
    exchanges = {leaf.spec.exchange for leaf in leaves.items}
    # The exchange function does not tell a conjugated view from a plain tensor.
    plain = all(leaf.spec.kind.parts == 1 for leaf in leaves.items)
    compiled = plain and len(exchanges) == 1 and 0 not in exchanges
    return _ByExchange(leaves) if compiled else _ByAttributes(leaves)
