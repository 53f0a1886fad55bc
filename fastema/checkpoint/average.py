"""Files averaged in a stream: what is in memory is the result and a few MB."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.bridges.memory import Memory
from fastema.checkpoint.files import File
from fastema.engine.program import Program
from fastema.layout.device_context import LaunchArgs
from fastema.layout.dtypes import DType, average_of, parse
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

__all__ = ["weighted_sum"]

_AT_ONCE: Final = 16 << 20
"""Bytes of all files together that are read before they are summed: they are still in the cache
then."""

_LEAST: Final = 1 << 14
"""Elements of each file that are read at once, however many files there are."""

_READERS: Final = 8
"""Threads that read: more than cores, since a disk answers several requests at a time best."""

Bytes = NDArray[np.uint8]


def weighted_sum(
    files: Sequence[File],
    coefficients: Sequence[float],
    result: Mapping[str, Memory],
    summed: Collection[str],
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """``result = sum of coefficient * file``, in float64, rounded once to the result's dtypes.

    All files have the same tensors, those not ``summed`` are taken from the last one, and
    ``result`` is row-major. ``advance`` is called with the number of bytes that were read.
    """
    with ExitStack() as stack:
        fills = [stack.enter_context(file.opened()) for file in files]
        newest = files[-1]
        for name, (_, spec) in result.items():
            if name not in summed and spec.nbytes:
                fills[-1](newest.tensors[name].offset, spec.bytes())
        threads = min(_READERS, 4 * (os.cpu_count() or 1))
        readers = stack.enter_context(ThreadPoolExecutor(threads, "fastema-read"))
        groups: dict[tuple[DType, DType], list[str]] = {}
        for name in summed:
            groups.setdefault((newest.tensors[name].kind, result[name][1].kind), []).append(name)
        for (kind, to), names in groups.items():
            bench = _Workbench(coefficients, kind, to)
            for batch in _batches(names, newest, bench.room):
                parts = [
                    readers.submit(_read_piece, fill, file, batch, buffer)
                    for fill, file, buffer in zip(fills, files, bench.buffers, strict=True)
                ]
                for part in parts:
                    part.result()
                bench.add_up()
                for piece in batch:
                    here, there, count = (
                        n * to.itemsize for n in (piece.at, piece.first, piece.size)
                    )
                    target = result[piece.name][1].bytes()
                    target[there : there + count] = bench.rounded.data[here : here + count]
                advance(len(files) * kind.itemsize * sum(piece.size for piece in batch))


class _Workbench:
    """Buffers for a part of every file, and the programs that make a part of the result of them."""

    def __init__(self, coefficients: Sequence[float], kind: DType, to: DType) -> None:
        fitting = _AT_ONCE // (len(coefficients) * kind.itemsize)
        self.room = max(fitting // _LEAST, 1) * _LEAST
        wide = average_of(kind, parse("f64"))
        self.buffers = [np.zeros(self.room * kind.itemsize, np.uint8) for _ in coefficients]
        self.rounded = np.zeros(self.room * to.itemsize, np.uint8)
        self._total = np.zeros(self.room * wide.itemsize, np.uint8)
        total = self._spec(self._total, wide)
        terms = [
            Pair("sum", total, self._spec(buffer, kind), average_index=index)
            for index, buffer in enumerate(self.buffers)
        ]
        self._sum = Program({"all": terms})
        self._round = Program({"all": [Pair("sum", self._spec(self.rounded, to), total)]})
        self._args = LaunchArgs(coefficients)

    def _spec(self, memory: Bytes, kind: DType) -> TensorSpec:
        address = memory.ctypes.data
        return TensorSpec(address, (self.room,), (1,), kind.code, "cpu", owner=memory)

    def add_up(self) -> None:
        """Make ``rounded`` of the buffers."""
        self._total.fill(0)
        self._sum.run({"all": "add"}, self._args)
        self._round.run({"all": "copy"})


class _Piece(NamedTuple):
    """Some adjacent elements of a tensor, and where they lie in the buffers."""

    name: str
    first: int
    size: int
    at: int


def _batches(names: Sequence[str], file: File, room: int) -> Iterator[list[_Piece]]:
    """The tensors cut into pieces, as many at a time as the buffers have room for."""
    batch: list[_Piece] = []
    at = 0
    for name in names:
        size, first = file.tensors[name].size, 0
        while first < size:
            piece = _Piece(name, first, min(size - first, room - at), at)
            batch.append(piece)
            first, at = first + piece.size, at + piece.size
            if at == room:
                yield batch
                batch, at = [], 0
    if batch:
        yield batch


def _read_piece(
    fill: Callable[[int, memoryview], None], file: File, batch: Sequence[_Piece], buffer: Bytes
) -> None:
    view = buffer.data
    for piece in batch:
        kind, _, offset = file.tensors[piece.name]
        begin, end = piece.at * kind.itemsize, (piece.at + piece.size) * kind.itemsize
        fill(offset + piece.first * kind.itemsize, view[begin:end])
