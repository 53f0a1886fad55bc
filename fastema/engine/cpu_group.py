"""Groups of pairs on the CPU, and their kernel launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fastema.engine.cpu import Launch
from fastema.engine.group import Group, formats_of
from fastema.engine.registry import kernel
from fastema.kernels import table as abi
from fastema.kernels.operations import OPERATIONS
from fastema.layout.group import Pair
from fastema.layout.table import IndexedTable, build_indexed_tables, count_bytes

__all__ = ["CpuGroup", "groups"]


class CpuGroup(Group):
    """Pairs of one tag, dtype pair and layout, in host memory."""

    def __init__(
        self, tag: str, members: Sequence[Pair], layout: str, rows: IndexedTable, claim: int
    ) -> None:
        super().__init__(tag, members)
        self._layout, self._table, self._pair = layout, rows.table, rows.pair
        self._offsets: dict[int, NDArray[np.int64]] = {}
        self._nbytes = count_bytes(members)
        self._control = np.zeros(abi.CONTROLS, np.int64)
        self._control[abi.CLAIM] = claim
        self._results = super().results()

    def launch(self, operation: str) -> Launch:
        """Compile the kernel of an operation and return its launch."""
        compiled = kernel(operation, formats_of(operation, self._members[0]), self._layout)
        if OPERATIONS[operation].counts and not len(self._results):
            self._results = np.empty(len(self._table))
            self._control[abi.RESULTS] = self._results.ctypes.data
        return Launch(compiled, self._table, self._control, self._nbytes)

    def relocate(self, dst: Mapping[str, int] | None, src: Mapping[str, int] | None) -> None:
        """Continue with the same tensors at other addresses, given by pair name."""
        if dst is not None:
            self._relocate_column(abi.DST, [pair.dst.address for pair in self._members], dst)
        if src is not None:
            self._relocate_column(abi.SRC, [pair.src.address for pair in self._members], src)

    def _relocate_column(self, column: int, before: Sequence[int], now: Mapping[str, int]) -> None:
        if column not in self._offsets:
            first = np.array(before, np.int64)[self._pair]
            self._offsets[column] = self._table[:, column] - first
        addresses = np.array([now[pair.name] for pair in self._members], np.int64)
        self._table[:, column] = self._offsets[column] + addresses[self._pair]

    def results(self) -> NDArray[np.float64]:
        """See :class:`Group`."""
        return self._results


def groups(tag: str, members: Sequence[Pair]) -> list[CpuGroup]:
    """Return groups for pairs of one tag and dtype pair: one for each layout of tables."""
    averages = len({pair.average_index for pair in members})
    tables = build_indexed_tables(members, averages)
    return [CpuGroup(tag, members, layout, rows, averages) for layout, rows in tables.items()]
