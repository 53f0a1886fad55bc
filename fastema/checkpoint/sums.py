"""Weighted sums of checkpoints, streamed with only a few pieces of them in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.bridges.memory import Memory
from fastema.checkpoint.files import File, Read, StoredTensor
from fastema.checkpoint.source import Checkpoint
from fastema.engine.program import Program
from fastema.engine.threads import get_num_threads
from fastema.layout.device_context import LaunchArgs
from fastema.layout.dtypes import DType, average_of, parse_dtype
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

__all__ = ["Write", "weighted_sum", "weighted_sums"]

Write = Callable[[int, str, int, memoryview], None]
"""``write(output, name, first, buffer)``: store a sum's bytes at ``first`` of a tensor."""

_ROOM: Final = 1 << 17
"""Elements of a buffer: in fewer, the time between system calls counts; more leave the caches."""

_TOGETHER: Final = 4
"""Checkpoints with a piece in memory at a time, per thread. They are added chunk by chunk, so that
a sum is loaded once for all of them; more leave the caches."""

_MOST_THREADS: Final = 8
"""More would evict each other's buffers from the caches."""


Bytes = NDArray[np.uint8]


class _Piece(NamedTuple):
    """A range of elements of a tensor, and its position in the buffers."""

    name: str
    first: int
    size: int
    at: int


class _Batch(NamedTuple):
    """Pieces of tensors with the same dtypes, up to one full buffer."""

    kinds: tuple[DType, ...]  # in each checkpoint
    to: DType
    pieces: list[_Piece]


def weighted_sums(
    reads: Sequence[Read],
    tensors: Sequence[Mapping[str, StoredTensor]],
    coefficients: Sequence[Sequence[float]],
    wanted: Mapping[str, DType],
    write: Write,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write ``sum of coefficient * checkpoint`` for every output, in float64, rounded once.

    Parameters
    ----------
    reads : sequence of function
        For every checkpoint, the function that reads it.
    tensors : sequence of mapping of str to StoredTensor
        For every checkpoint, its tensors; shapes are the same in all.
    coefficients : sequence of sequence of float
        For every output, one coefficient per checkpoint. All outputs are computed in one pass.
    wanted : mapping of str to DType
        The tensors to sum, which are floats in every checkpoint, and their dtypes in the outputs.
    write : function
        Called from several threads, with pieces that do not overlap.
    advance : function
        Called from several threads with the number of bytes just read.
    """
    batches = _batches(tensors, wanted)
    taking = threading.Lock()
    stop = threading.Event()

    def work() -> None:
        benches: dict[tuple[tuple[DType, ...], DType], _Workbench] = {}
        while not stop.is_set():
            with taking:
                batch = next(batches, None)
            if batch is None:
                return
            key = batch.kinds, batch.to
            if key not in benches:
                benches.clear()  # free the buffers of other dtypes
                benches[key] = _Workbench(coefficients, *key)
            advance(benches[key].run(reads, batch.pieces, write))

    threads = min(get_num_threads(), _MOST_THREADS)
    with ThreadPoolExecutor(threads, "fastema-sum") as pool:
        futures = [pool.submit(work) for _ in range(threads)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise


class _Workbench:
    """A thread's buffers, and the kernels that compute a piece of every output from them."""

    def __init__(
        self, coefficients: Sequence[Sequence[float]], kinds: tuple[DType, ...], to: DType
    ) -> None:
        self._kinds, self._to = kinds, to
        wide = average_of(to, parse_dtype("f64"))
        count = min(len(kinds), _TOGETHER)
        largest = max(kind.itemsize for kind in kinds)
        self._buffers: list[Bytes] = [np.zeros(_ROOM * largest, np.uint8) for _ in range(count)]
        self._totals: list[Bytes] = [
            np.zeros(_ROOM * wide.itemsize, np.uint8) for _ in coefficients
        ]
        self._rounded: list[Bytes] = [np.zeros(_ROOM * to.itemsize, np.uint8) for _ in coefficients]
        totals = [_spec(total, wide) for total in self._totals]
        self._groups = [
            self._group(range(begin, min(begin + count, len(kinds))), totals, coefficients)
            for begin in range(0, len(kinds), count)
        ]
        pairs = [
            Pair(f"{k}", _spec(rounded, to), total)
            for k, (rounded, total) in enumerate(zip(self._rounded, totals, strict=True))
        ]
        self._round = Program({"all": pairs})

    def _group(
        self,
        members: range,
        totals: Sequence[TensorSpec],
        coefficients: Sequence[Sequence[float]],
    ) -> tuple[range, Program, LaunchArgs]:
        """Return checkpoints, the program that adds them to the totals, and their coefficients."""
        pairs: list[Pair] = []
        numbers: list[float] = []
        for k, total in enumerate(totals):
            for place, i in enumerate(members):
                if not coefficients[k][i]:  # 0 * NaN would be NaN
                    continue
                source = _spec(self._buffers[place], self._kinds[i])
                pairs.append(Pair(f"{k}", total, source, average_index=len(numbers)))
                numbers.append(coefficients[k][i])
        return members, Program({"all": pairs}), LaunchArgs(numbers)

    def run(self, reads: Sequence[Read], pieces: Sequence[_Piece], write: Write) -> int:
        """Sum pieces and write the results; return the number of bytes read."""
        for total in self._totals:
            total.fill(0)
        elements = sum(piece.size for piece in pieces)
        done = 0
        for members, program, args in self._groups:
            for buffer, i in zip(self._buffers, members, strict=False):
                size = self._kinds[i].itemsize
                for name, first, count, at in pieces:
                    part = buffer.data[at * size : (at + count) * size]
                    reads[i](name, first * size, part)
                done += elements * size
            program.run({"all": "add"}, args)
        self._round.run({"all": "copy"})
        size = self._to.itemsize
        for k, rounded in enumerate(self._rounded):
            for name, first, count, at in pieces:
                write(k, name, first * size, rounded.data[at * size : (at + count) * size])
        return done


def _spec(memory: Bytes, kind: DType) -> TensorSpec:
    return TensorSpec(memory.ctypes.data, (_ROOM,), (1,), kind.code, "cpu", owner=memory)


def _batches(
    tensors: Sequence[Mapping[str, StoredTensor]], wanted: Mapping[str, DType]
) -> Iterator[_Batch]:
    """Cut the tensors into pieces; yield as many at a time as fit in the buffers."""
    groups: dict[tuple[tuple[DType, ...], DType], list[str]] = {}
    for name, to in wanted.items():
        kinds = tuple(one[name].kind for one in tensors)
        groups.setdefault((kinds, to), []).append(name)
    for (kinds, to), names in groups.items():
        for pieces in _fill_batches(names, tensors[0]):
            yield _Batch(kinds, to, pieces)


def _fill_batches(
    names: Iterable[str], tensors: Mapping[str, StoredTensor]
) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    at = 0
    for name in names:
        size, first = tensors[name].size, 0
        while first < size:
            piece = _Piece(name, first, min(size - first, _ROOM - at), at)
            batch.append(piece)
            first, at = first + piece.size, at + piece.size
            if at == _ROOM:
                yield batch
                batch, at = [], 0
    if batch:
        yield batch


def weighted_sum(
    files: Sequence[File | Checkpoint],
    coefficients: Sequence[float],
    result: Mapping[str, Memory],
    summed: Collection[str],
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Sum checkpoints into row-major memory; see :func:`weighted_sums`.

    All must have the same tensors. Tensors not in ``summed`` are copied from the last.
    """
    with ExitStack() as stack:
        reads = [stack.enter_context(file.opened()) for file in files]
        for name, (_, spec) in result.items():
            if name not in summed and spec.nbytes:
                reads[-1](name, 0, spec.bytes())

        def write(output: int, name: str, first: int, data: memoryview) -> None:
            result[name][1].bytes()[first : first + len(data)] = data

        tensors = [file.tensors for file in files]
        wanted = {name: result[name][1].kind for name in summed}
        weighted_sums(reads, tensors, [coefficients], wanted, write, advance)
