"""Chunk tables: pairs of tensors as rows of elements that a kernel iterates over."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.kernels.table import (
    AVERAGE,
    CHUNK,
    COLUMNS,
    COUNT,
    DST,
    DST_STEP,
    GPU_CHUNKS,
    GPU_ROWS,
    INDEX,
    INDEX_JUMP,
    INDEX_RUN,
    INDEX_STEP,
    KEY,
    RESIDUAL,
    RING,
    RING_STRIDE,
    SHARED_CHUNK,
    SRC,
    SRC_STEP,
)
from fastema.layout.flat import row_major
from fastema.layout.group import Pair

__all__ = [
    "IndexedTable",
    "Table",
    "build_indexed_tables",
    "build_tables",
    "count_bytes",
    "first_and_strides",
    "gpu_chunk",
    "tensor_key",
]

Table = NDArray[np.int64]


class IndexedTable(NamedTuple):
    """A table, and for each of its rows the index of the row's pair."""

    table: Table
    pair: NDArray[np.int64]


_Form = tuple[object, ...]


class _Axis(NamedTuple):
    """Extent of an axis, and its strides in ``dst``, in ``src`` and in the index (``place``).

    All are in elements of the kernel format. The index counts the full tensor in row-major order.
    """

    extent: int
    dst: int
    src: int
    place: int

    def follows(self, inner: _Axis) -> bool:
        """Return whether this axis continues in memory where ``inner`` ends."""
        n = inner.extent
        return self.dst == n * inner.dst and self.src == n * inner.src

    def continues(self, inner: _Axis) -> bool:
        """Return whether this axis and ``inner`` can be merged, indices included."""
        return self.follows(inner) and self.place == inner.extent * inner.place


class _Walk(NamedTuple):
    """The axes that a row iterates over: one, and an outer one that continues it in memory.

    ``outer`` has extent 1 if there is none.
    """

    inner: _Axis
    outer: _Axis

    @property
    def length(self) -> int:
        """The number of elements."""
        return self.inner.extent * self.outer.extent


_LONG: Final = 16
"""Elements from which a row of adjacent elements is faster than a longer, strided row."""

_VECTOR: Final = 8
"""Maximum elements that a GPU thread moves at once if they take random bits."""

_HALF: Final = 1 << 32
"""Number of indices with the same high half, which is part of a row's key."""


def first_and_strides(pair: Pair) -> tuple[int, tuple[int, ...]]:
    """Return the index of a pair's first element in the full tensor, and the index strides.

    Indices count in row-major order, for any order in memory. All are 0 without random bits.
    """
    if not pair.form.endswith("~"):
        return 0, (0,) * len(pair.dst.shape)
    part = pair.src if pair.src.whole else pair.dst
    strides = row_major(part.whole or part.shape)
    return sum(i * s for i, s in zip(part.offset or (), strides, strict=False)), strides


def _merge_axes(pair: Pair, index: tuple[int, ...]) -> list[_Axis]:
    """Return the axes of a pair, outermost of ``dst`` first, merged where both sides allow it."""
    dst, src = pair.dst, pair.src
    parts = dst.kind.parts
    usual = row_major(dst.shape)
    if dst.strides == src.strides == usual and (index == usual or not any(index)):
        return [_Axis(dst.size * parts, 1, 1, int(any(index)))]
    axes = [
        _Axis(n, d * parts, s * parts, i)
        for n, d, s, i in zip(dst.shape, dst.strides, src.strides, index, strict=True)
        if n != 1
    ]
    axes.sort(key=lambda axis: (-abs(axis.dst), -abs(axis.src)))
    if parts > 1:
        axes.append(_Axis(parts, 1, 1, 0))
    merged: list[_Axis] = []
    for axis in axes:
        if merged and merged[-1].continues(axis):
            merged[-1] = axis._replace(extent=merged[-1].extent * axis.extent)
        else:
            merged.append(axis)
    return merged or [_Axis(1, 1, 1, 1)]


def _walk(axes: list[_Axis], most: int, twofold: bool) -> _Walk:
    """Remove the axes that rows iterate over from ``axes``, and return them."""
    if len(axes) == 1:
        return _Walk(axes.pop(), _Axis(1, 0, 0, 0))
    walks = [_Walk(axis, _Axis(1, 0, 0, 0)) for axis in axes]
    if twofold:
        for i, inner in enumerate(axes):
            outer = next((axis for axis in axes[:i] if axis.follows(inner)), None)
            if outer is not None and inner.extent <= most:
                walks[i] = _Walk(inner, outer)
    adjacent = [walk for walk in walks if walk.inner[1:3] == (1, 1) and walk.length >= _LONG]
    chosen = adjacent[0] if adjacent else max(walks, key=lambda walk: walk.length)
    for axis in chosen:
        if axis in axes:
            axes.remove(axis)
    return chosen


def tensor_key(pair: Pair) -> int:
    """Return 32 bits that identify an average of a tensor, independent of address and order."""
    return zlib.crc32(f"{pair.average_index}/{pair.name}".encode())


def _rows(pair: Pair, most: int) -> Table:
    """Return the rows of a pair: inner axes inside of a row, the others spread over rows."""
    first, index = first_and_strides(pair)
    reach = first + sum([(n - 1) * i for n, i in zip(pair.dst.shape, index, strict=True)])
    one_half = first // _HALF == reach // _HALF
    axes = _merge_axes(pair, index)
    walk = _walk(axes, most, one_half)
    row = np.zeros((1, COLUMNS), np.int64)
    row[:, [DST, SRC, RESIDUAL, RING]] = _addresses(pair)
    row[:, INDEX] = first
    row[:, [INDEX_RUN, DST_STEP, SRC_STEP, INDEX_STEP]] = list(walk.inner)
    row[:, COUNT], row[:, INDEX_JUMP] = walk.length, walk.outer.place
    if pair.ring is not None:
        row[:, RING_STRIDE] = pair.ring[1]
    rows = _cut_into_chunks(_expand_rows(row, pair, axes), pair, most)
    return rows if one_half else _cut_at_halves(rows, pair)


def _streams(pair: Pair) -> list[tuple[int, int, int]]:
    """Return address column, step column and bytes per element for each tensor of a pair."""
    slot = None if pair.ring is None else pair.ring[0]
    streams = [
        *((DST, DST_STEP, pair.dst), (SRC, SRC_STEP, pair.src)),
        *((RESIDUAL, DST_STEP, pair.residual), (RING, DST_STEP, slot)),
    ]
    return [
        (column, step, spec.kind.itemsize // spec.kind.parts)
        for column, step, spec in streams
        if spec is not None
    ]


def _expand_rows(rows: Table, pair: Pair, axes: Sequence[_Axis]) -> Table:
    """Return a copy of a row for every index of ``axes``."""
    offsets = np.zeros((1, 3), np.int64)
    for n, *strides in axes:
        steps = np.arange(n, dtype=np.int64)[:, None] * np.array(strides, np.int64)
        offsets = (offsets[:, None, :] + steps[None, :, :]).reshape(-1, 3)
    rows = np.repeat(rows, len(offsets), axis=0)
    for column, step, size in _streams(pair):
        rows[:, column] += offsets[:, step - DST_STEP] * size
    rows[:, INDEX] += offsets[:, 2]
    return rows


def _cut_into_chunks(rows: Table, pair: Pair, most: int) -> Table:
    """Return rows cut into pieces of at most ``most`` elements."""
    count, run = rows[0, [COUNT, INDEX_RUN]]  # all rows of a tensor have the same length
    if count <= most:
        return rows
    if count > run:  # start pieces at a run, and on a vector if possible
        vectors = math.lcm(run, _VECTOR)
        most -= most % (vectors if vectors <= most else run)
    pieces = -(-count // most)
    first = np.tile(np.arange(pieces) * most, len(rows))
    return _clip_rows(np.repeat(rows, pieces, axis=0), pair, first, np.minimum(first + most, count))


def _cut_at_halves(rows: Table, pair: Pair) -> Table:
    """Return rows cut where the high half of the index changes; rows must have one run each."""
    step = np.maximum(rows[:, INDEX_STEP], 1)
    last = rows[:, INDEX] + (rows[:, COUNT] - 1) * step
    pieces = last // _HALF - rows[:, INDEX] // _HALF + 1
    cut, step = np.repeat(rows, pieces, axis=0), np.repeat(step, pieces)
    number = np.arange(len(cut)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    half = (cut[:, INDEX] // _HALF + number) * _HALF
    first, end = (
        np.clip(-((cut[:, INDEX] - border) // step), 0, cut[:, COUNT])
        for border in (half, half + _HALF)
    )
    kept = end > first  # a step may skip a whole half
    return _clip_rows(cut[kept], pair, first[kept], end[kept])


def _clip_rows(rows: Table, pair: Pair, first: NDArray[np.int64], end: NDArray[np.int64]) -> Table:
    """Cut every row down to its elements from ``first`` up to ``end``, in place."""
    for column, step, size in _streams(pair):
        rows[:, column] += first * rows[:, step] * size
    runs, rest = first // rows[:, INDEX_RUN], first % rows[:, INDEX_RUN]
    rows[:, INDEX] += runs * rows[:, INDEX_JUMP] + rest * rows[:, INDEX_STEP]
    rows[:, COUNT] = end - first
    return rows


def _pattern(group: Sequence[Pair], chunk: int | None) -> Table:
    """Return rows of averages of one tensor, with rows that read the same chunk adjacent."""
    shared = len(group) > 1 or group[0].ring is not None
    most = chunk or (SHARED_CHUNK if shared else CHUNK)
    return np.stack([_rows(pair, most) for pair in group], axis=1).reshape(-1, COLUMNS)


def _form(pair: Pair) -> _Form:
    """Return everything that a pair's rows depend on, except addresses and name."""
    _, dst, src, _, residual, ring, _ = pair
    companion = None if residual is None else residual.dtype
    slots = None if ring is None else (ring[0].dtype, ring[1])
    memory = dst.shape, dst.strides, src.strides, dst.dtype, src.dtype, companion, slots
    return *memory, *first_and_strides(pair)


def _addresses(pair: Pair) -> tuple[int, int, int, int]:
    _, dst, src, _, residual, ring, _ = pair
    companion, slot = (
        0 if residual is None else residual.address,
        0 if ring is None else ring[0].address,
    )
    return dst.address, src.address, companion, slot


def gpu_chunk(pairs: Sequence[Pair]) -> int:
    """Return the maximum row length for a GPU: a power of two that yields enough rows."""
    least, most = GPU_CHUNKS
    wanted = sum(pair.dst.size for pair in pairs) // GPU_ROWS
    return min(max(1 << wanted.bit_length(), least), most)


def build_indexed_tables(
    pairs: Iterable[Pair], num_averages: int = 1, chunk: int | None = None
) -> dict[str, IndexedTable]:
    """Return the chunk tables of pairs with the same dtypes: ``"flat"`` and ``"strided"``.

    Flat rows have adjacent elements. Dense tensors have flat rows for any order of axes that both
    sides share; with random bits, only parts in row-major order have. A layout without rows is left
    out.

    Parameters
    ----------
    pairs : iterable of Pair
        Pairs with the same dtypes; averages of one tensor must be adjacent.
    num_averages : int
        Averages per tensor. Rows that read the same chunk of a tensor are adjacent, so that it is
        read from memory once.
    chunk : int, optional
        Maximum elements per row; by default what suits a CPU.
    """
    pairs = list(pairs)
    numbers = [number for number, pair in enumerate(pairs) if pair.dst.size]
    if not numbers:
        return {}
    kept = [pairs[number] for number in numbers]
    groups = [kept[first : first + num_averages] for first in range(0, len(kept), num_averages)]
    # Models have many tensors and few shapes: tensors of one form differ in address and key only.
    firsts: dict[tuple[_Form, ...], int] = {}
    like = [firsts.setdefault(tuple(map(_form, one)), place) for place, one in enumerate(groups)]
    patterns = [_pattern(groups[place], chunk) for place in firsts.values()]
    form = np.searchsorted(list(firsts.values()), like)
    # For every row: its group, its row in the group's pattern, its pair, and the pattern's pair.
    lengths = np.array([len(pattern) for pattern in patterns])
    count = lengths[form]
    group = np.repeat(np.arange(len(groups)), count)
    place = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)
    member = place % np.array([len(one) for one in groups])[group]  # the last group may be smaller
    pair = group * num_averages + member
    model = np.array(like)[group] * num_averages + member
    table = np.concatenate(patterns)[(np.cumsum(lengths) - lengths)[form][group] + place]
    addresses = np.array([_addresses(one) for one in kept])
    table[:, [DST, SRC, RESIDUAL, RING]] += addresses[pair] - addresses[model]
    table[:, AVERAGE] = np.array([one.average_index for one in kept])[pair]
    table[:, KEY] = np.array([tensor_key(one) for one in kept])[pair]
    adjacent = (table[:, DST_STEP] == 1) & (table[:, SRC_STEP] == 1)
    adjacent &= (table[:, INDEX_STEP] <= 1) & (table[:, INDEX_JUMP] == 0)
    layouts = {"flat": adjacent, "strided": ~adjacent}
    return {
        layout: IndexedTable(table[rows], np.array(numbers)[pair][rows])
        for layout, rows in layouts.items()
        if rows.any()
    }


def build_tables(
    pairs: Iterable[Pair], num_averages: int = 1, chunk: int | None = None
) -> dict[str, Table]:
    """Return the tables of :func:`build_indexed_tables`, without the pairs' indices."""
    found = build_indexed_tables(pairs, num_averages, chunk)
    return {layout: rows.table for layout, rows in found.items()}


def count_bytes(pairs: Sequence[Pair]) -> int:
    """Return the bytes of both sides, by which work is divided among threads."""
    return sum(p.dst.nbytes + p.src.nbytes for p in pairs)
