"""Launches on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fastema.engine import cpu
from fastema.engine.group import formats_of, nothing_measured
from fastema.engine.moment import Moment
from fastema.engine.registry import kernel
from fastema.kernels.table import (
    CLAIM,
    CONTROLS,
    DST,
    MEASURES,
    MEASURING,
    NEXT,
    RESULTS,
    SEED,
    SLOT,
    SRC,
    STEP,
    TURN,
    WHICH,
    WINDOW,
)
from fastema.layout.group import Pair
from fastema.layout.table import Rows, moved_bytes, numbered_tables

__all__ = ["CpuGroup", "groups"]

_SETTINGS: Final = np.array([SEED, STEP, WINDOW, SLOT, TURN])
"""Columns of the control block that a moment gives, in its order."""


class CpuGroup:
    """Pairs of one tag, dtype pair and layout in the memory of the host."""

    def __init__(
        self, tag: str, members: Sequence[Pair], layout: str, rows: Rows, together: int
    ) -> None:
        self.tag = tag
        self.which: NDArray[np.int64] = rows.table[:, WHICH]
        self._like, self._layout, self._table = members[0], layout, rows.table
        self._members, self._pair = members, rows.pair
        self._offsets: dict[int, NDArray[np.int64]] = {}
        self._nbytes = moved_bytes(members)
        self._numbers = np.zeros(1 + max(pair.which for pair in members))
        self._control = np.zeros(CONTROLS, np.int64)
        self._control[CLAIM] = together
        self._results = nothing_measured()

    def prepare(self, operation: str) -> Callable[[], None]:
        """Compile what an operation needs: the launch."""
        compiled = kernel("cpu", operation, formats_of(operation, self._like), self._layout)
        if operation in MEASURING and not len(self._results):
            self._results = np.empty((len(self._table), MEASURES))
            self._control[RESULTS] = self._results.ctypes.data
        table, control = self._table.ctypes.data, self._control.ctypes.data
        numbers, rows = self._numbers.ctypes.data, len(self._table)
        return partial(cpu.launch, compiled, table, rows, numbers, control, self._nbytes)

    def begin(self, moment: Moment) -> None:
        """Take over what the next launches are to work with."""
        self._numbers[:] = moment.numbers[: len(self._numbers)]
        self._control[NEXT] = 0
        self._control[_SETTINGS] = moment[1:6]

    def relocate(self, dst: Mapping[str, int] | None, src: Mapping[str, int] | None) -> None:
        """Go on with the same tensors at other addresses."""
        if dst is not None:
            self._move(DST, [pair.dst.address for pair in self._members], dst)
        if src is not None:
            self._move(SRC, [pair.src.address for pair in self._members], src)

    def _move(self, column: int, before: Sequence[int], now: Mapping[str, int]) -> None:
        if column not in self._offsets:
            first = np.array(before, np.int64)[self._pair]
            self._offsets[column] = self._table[:, column] - first
        addresses = np.array([now[pair.name] for pair in self._members], np.int64)
        self._table[:, column] = self._offsets[column] + addresses[self._pair]

    def results(self) -> NDArray[np.float64]:
        """Measures of every row; none before a measuring operation was run."""
        return self._results


def groups(tag: str, members: Sequence[Pair]) -> list[CpuGroup]:
    """The launches of pairs of one tag and dtype pair."""
    together = len({pair.which for pair in members})
    tables = numbered_tables(members, together)
    return [CpuGroup(tag, members, layout, rows, together) for layout, rows in tables.items()]
