"""Pairs of tensors compiled into launches: what a plan runs at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.engine import cpu
from fastema.engine.interrupts import deferred
from fastema.engine.locks import lock
from fastema.engine.registry import kernel
from fastema.errors import DTypeError
from fastema.kernels.table import SCALARS, WEIGHT
from fastema.layout.dtypes import DType, raw
from fastema.layout.group import Pair
from fastema.layout.table import Table, chunk_tables, moved_bytes

__all__ = ["Program"]

_LAUNCHERS: Final[dict[str, Callable[..., None]]] = {"cpu": cpu.launch}

_BITS: Final = {"park", "unpark", "read_read_write"}
"""Operations on bits, whatever they stand for."""

_CONVERTING: Final = {"copy", "swap"}
"""Operations that move bits unchanged between equal dtypes."""


def _formats(operation: str, dst: DType, src: DType) -> tuple[str, str]:
    if operation in _BITS or (operation in _CONVERTING and dst == src):
        return raw(dst), raw(src)
    if dst.real is None or src.real is None:
        raise DTypeError(f"{operation}: {dst.code} is not averaged, only copied and swapped")
    return dst.real, src.real


class _Group(NamedTuple):
    tag: str
    device: str
    dst: DType
    src: DType
    layout: str
    table: Table
    cursor: NDArray[np.int64]
    nbytes: int


_Launch = tuple[Callable[..., None], tuple[Any, ...]]


class Program:
    """Runs operations over a fixed set of pairs.

    The pairs' owners must outlive it: it holds addresses. An interrupt waits for the end of a run,
    so that no tensor is left half done.

    Parameters
    ----------
    pairs : mapping of str to sequence of Pair
        Checked pairs, each memory once, under tags of the caller's; a run gives each tag its
        operation.
    """

    def __init__(self, pairs: Mapping[str, Sequence[Pair]]) -> None:
        self._lock = lock()
        self._scalars = np.zeros(SCALARS)
        self._launches: dict[tuple[tuple[str, str], ...], list[_Launch]] = {}
        kinds: dict[tuple[str, str, str, str], list[Pair]] = {}
        for tag, members in pairs.items():
            for pair in members:
                key = (tag, pair.dst.device, pair.dst.dtype, pair.src.dtype)
                kinds.setdefault(key, []).append(pair)
        self._groups = [
            group for (tag, *_), members in kinds.items() for group in _groups(tag, members)
        ]

    def prepare(self, operations: Mapping[str, str]) -> list[_Launch]:
        """Compile what a run needs; called by :meth:`run`, or earlier to fail before writing."""
        key = tuple(operations.items())
        launches = self._launches.get(key)
        if launches is None:
            launches = [
                self._launch(group, operations[group.tag])
                for group in self._groups
                if group.tag in operations
            ]
            self._launches[key] = launches
        return launches

    def _launch(self, group: _Group, operation: str) -> _Launch:
        formats = _formats(operation, group.dst, group.src)
        compiled = kernel(group.device, operation, *formats, group.layout)
        table, cursor = group.table.ctypes.data, group.cursor.ctypes.data
        scalars = self._scalars.ctypes.data
        return _LAUNCHERS[group.device], (
            *(compiled, table, len(group.table), scalars, cursor, group.nbytes),
        )

    def run(self, operations: Mapping[str, str], weight: float = 0.0) -> None:
        """Run one operation per tag over all its pairs.

        Parameters
        ----------
        operations : mapping of tag to operation
            ``"lerp"``, ``"copy"``, ``"swap"``, ``"park"`` or ``"unpark"``; pairs under other tags
            are left alone.
        weight : float
            Weight of the new value in ``"lerp"``.
        """
        launches = self.prepare(operations)
        with self._lock, deferred():
            self._scalars[WEIGHT] = weight
            for group in self._groups:
                group.cursor[0] = 0
            for launch, args in launches:
                launch(*args)


def _groups(tag: str, members: Sequence[Pair]) -> list[_Group]:
    first = members[0]
    device = first.dst.device.partition(":")[0]
    if device not in _LAUNCHERS:
        raise DTypeError(f"{first.name}: no kernels for device {first.dst.device}")
    nbytes = moved_bytes(members)
    return [
        _Group(
            *(tag, device, first.dst.kind, first.src.kind),
            *(layout, table, np.zeros(1, np.int64), nbytes),
        )
        for layout, table in chunk_tables(members).items()
    ]
