"""Chunk tables: a pair of tensors as rows of elements that a kernel walks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.kernels.table import (
    CHUNK,
    COLUMNS,
    COUNT,
    DST,
    DST_STEP,
    GPU_CHUNKS,
    GPU_ROWS,
    INDEX,
    INDEX_STEP,
    KEY,
    LOW,
    RING,
    RING_STRIDE,
    SHARED_CHUNK,
    SRC,
    SRC_STEP,
    WHICH,
)
from fastema.layout.group import Pair

__all__ = ["Rows", "Table", "chunk_tables", "gpu_chunk", "moved_bytes", "numbered_tables"]

Table = NDArray[np.int64]


class Rows(NamedTuple):
    """A table, and for each of its rows the place of its pair among the pairs."""

    table: Table
    pair: NDArray[np.int64]


_Axis = tuple[int, int, int, int]
"""Extent, stride of the written side, stride of the other side, places in the tensor; in elements
of the format."""


def _joint_axes(pair: Pair) -> list[_Axis]:
    """The axes of both sides, outermost of the written side first, merged where both allow it."""
    _, dst, src, *_ = pair
    parts = dst.kind.parts
    axes = [
        (n, d * parts, s * parts)
        for n, d, s in zip(dst.shape, dst.strides, src.strides, strict=True)
        if n != 1
    ]
    axes.sort(key=lambda axis: (-abs(axis[1]), -abs(axis[2])))
    if parts > 1:
        axes.append((parts, 1, 1))
    placed: list[_Axis] = []
    places = 1
    for n, d, s in reversed(axes):
        placed.append((n, d, s, places))
        places *= n
    merged: list[_Axis] = []
    for n, d, s, place in reversed(placed):
        if merged:
            outer, outer_d, outer_s, _ = merged[-1]
            if outer_d == n * d and outer_s == n * s:
                merged[-1] = (outer * n, d, s, place)
                continue
        merged.append((n, d, s, place))
    return merged or [(1, 1, 1, 1)]


def _key(pair: Pair) -> int:
    """32 bits that tell a tensor's average from others, wherever and in what order they lie."""
    return zlib.crc32(f"{pair.which}/{pair.name}".encode())


def _rows(pair: Pair) -> Table:
    """Rows of one pair: the axis that is walked inside a row, the others spread out over rows."""
    dst, src = pair.dst, pair.src
    axes = _joint_axes(pair)
    adjacent = [axis for axis in axes if axis[1:3] == (1, 1)]
    # A long axis in a row beats adjacent elements in rows of a few.
    inner = adjacent[0] if adjacent and adjacent[0][0] >= 16 else max(axes)
    axes.remove(inner)
    offsets = np.zeros((1, 3), np.int64)
    for n, *strides in axes:
        steps = np.arange(n, dtype=np.int64)[:, None] * np.array(strides, np.int64)
        offsets = (offsets[:, None, :] + steps[None, :, :]).reshape(-1, 3)
    rows = np.zeros((len(offsets), COLUMNS), np.int64)
    dst_size, src_size = dst.kind.itemsize // dst.kind.parts, src.kind.itemsize // src.kind.parts
    rows[:, DST] = dst.address + offsets[:, 0] * dst_size
    rows[:, SRC] = src.address + offsets[:, 1] * src_size
    rows[:, [COUNT, DST_STEP, SRC_STEP, INDEX_STEP]] = inner
    rows[:, INDEX] = offsets[:, 2]
    rows[:, WHICH], rows[:, KEY] = pair.which, _key(pair)
    if pair.low is not None:
        size = pair.low.kind.itemsize // pair.low.kind.parts
        rows[:, LOW] = pair.low.address + offsets[:, 0] * size
    if pair.ring is not None:
        slot, stride = pair.ring
        size = slot.kind.itemsize // slot.kind.parts
        rows[:, RING] = slot.address + offsets[:, 0] * size
        rows[:, RING_STRIDE] = stride
    return rows


def _chunked(rows: Table, pair: Pair, most: int) -> Table:
    """The rows cut into pieces of at most ``most`` elements."""
    if rows[0, COUNT] <= most:  # all rows of a tensor are of one length
        return rows
    pieces = -(-rows[:, COUNT] // most)
    cut = np.repeat(rows, pieces, axis=0)
    first = np.arange(len(cut)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    done = first * most
    cut[:, COUNT] = np.minimum(most, cut[:, COUNT] - done)
    cut[:, INDEX] += done * cut[:, INDEX_STEP]
    slot = None if pair.ring is None else pair.ring[0]
    sides = [(DST, DST_STEP, pair.dst), (SRC, SRC_STEP, pair.src)]
    sides += [(LOW, DST_STEP, pair.low), (RING, DST_STEP, slot)]  # type: ignore[list-item]
    for column, step, spec in sides:
        if spec is not None:
            cut[:, column] += done * cut[:, step] * (spec.kind.itemsize // spec.kind.parts)
    return cut


def gpu_chunk(pairs: Sequence[Pair]) -> int:
    """Most elements in a row of a GPU's table: a power of two that gives enough rows."""
    least, most = GPU_CHUNKS
    wanted = sum(pair.dst.size for pair in pairs) // GPU_ROWS
    return min(max(1 << wanted.bit_length(), least), most)


def numbered_tables(
    pairs: Iterable[Pair], together: int = 1, chunk: int | None = None
) -> dict[str, Rows]:
    """The tables of pairs of one dtype pair: ``"flat"`` (adjacent elements) and ``"strided"``.

    A layout without rows is left out. Dense tensors give flat rows whatever their order of axes, as
    long as both sides share it.

    Parameters
    ----------
    pairs : iterable of Pair
    together : int
        Averages of one tensor that follow each other among the pairs: the rows that read one chunk
        of it then follow each other too, so that it comes from memory once.
    chunk : int, optional
        Most elements in one row; by default what suits a CPU.
    """
    kept = [(place, pair) for place, pair in enumerate(pairs) if pair.dst.size]
    tables: dict[str, list[Table]] = {"flat": [], "strided": []}
    places: dict[str, list[NDArray[np.int64]]] = {"flat": [], "strided": []}
    for first in range(0, len(kept), together):
        numbers, members = zip(*kept[first : first + together], strict=True)
        shared = together > 1 or members[0].ring is not None
        most = chunk or (SHARED_CHUNK if shared else CHUNK)
        rows = np.stack([_chunked(_rows(pair), pair, most) for pair in members], axis=1)
        adjacent = (rows[0, 0, DST_STEP] == 1) & (rows[0, 0, SRC_STEP] == 1)
        layout = "flat" if adjacent else "strided"
        tables[layout].append(rows.reshape(-1, COLUMNS))
        places[layout].append(np.tile(np.array(numbers, np.int64), len(rows)))
    return {
        layout: Rows(np.concatenate(parts), np.concatenate(places[layout]))
        for layout, parts in tables.items()
        if parts
    }


def chunk_tables(
    pairs: Iterable[Pair], together: int = 1, chunk: int | None = None
) -> dict[str, Table]:
    """The tables of :func:`numbered_tables` alone."""
    found = numbered_tables(pairs, together, chunk)
    return {layout: rows.table for layout, rows in found.items()}


def moved_bytes(pairs: Sequence[Pair]) -> int:
    """Bytes of both sides together, by which work is shared out over threads."""
    return sum(math.prod(p.dst.shape) * (p.dst.kind.itemsize + p.src.kind.itemsize) for p in pairs)
