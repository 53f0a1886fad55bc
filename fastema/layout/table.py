"""Chunk tables: a pair of tensors as rows of elements that a kernel walks."""

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
    "Rows",
    "Table",
    "chunk_tables",
    "first_and_strides",
    "gpu_chunk",
    "moved_bytes",
    "numbered_tables",
    "tensor_key",
]

Table = NDArray[np.int64]


class Rows(NamedTuple):
    """A table, and for each of its rows the place of its pair among the pairs."""

    table: Table
    pair: NDArray[np.int64]


_Form = tuple[object, ...]


class _Axis(NamedTuple):
    """Extent, and strides: of the written side, of the other, of the index in the whole tensor.

    In elements of the format.
    """

    extent: int
    dst: int
    src: int
    place: int

    def follows(self, inner: _Axis) -> bool:
        """Return whether this axis continues in memory where an inner one ends."""
        n = inner.extent
        return self.dst == n * inner.dst and self.src == n * inner.src

    def continues(self, inner: _Axis) -> bool:
        """Return whether both are one axis."""
        return self.follows(inner) and self.place == inner.extent * inner.place


class _Walk(NamedTuple):
    """The axes that a row walks: one, and the next where its runs follow each other in memory.

    Without an outer axis that one is of extent 1.
    """

    inner: _Axis
    outer: _Axis

    @property
    def length(self) -> int:
        """The number of elements."""
        return self.inner.extent * self.outer.extent


_LONG: Final = 16
"""Elements from which on a row of adjacent ones beats a longer row of spaced ones."""

_VECTOR: Final = 8
"""Elements that a thread of a GPU moves at once, at most, of those that take random bits."""

_HALF: Final = 1 << 32
"""Indices whose high half is the same: it is part of a row's key."""


def first_and_strides(pair: Pair) -> tuple[int, tuple[int, ...]]:
    """Index of the first element in the whole tensor, and from one to the next on each axis.

    In row-major order, whatever the order in memory; all 0 where no random bits are used.
    """
    if not pair.form.endswith("~"):
        return 0, (0,) * len(pair.dst.shape)
    part = pair.src if pair.src.whole else pair.dst
    strides = row_major(part.whole or part.shape)
    return sum(i * s for i, s in zip(part.offset or (), strides, strict=False)), strides


def _joint_axes(pair: Pair, index: tuple[int, ...]) -> list[_Axis]:
    """The axes of both sides, outermost of the written side first, merged where all allow it."""
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
    """Take the axes that rows walk out of a list."""
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
    """32 bits that tell a tensor's average from others, wherever and in what order they lie."""
    return zlib.crc32(f"{pair.average_index}/{pair.name}".encode())


def _rows(pair: Pair, most: int) -> Table:
    """Rows of one pair: the axes that are walked inside a row, the others spread out over rows."""
    first, index = first_and_strides(pair)
    reach = first + sum([(n - 1) * i for n, i in zip(pair.dst.shape, index, strict=True)])
    one_half = first // _HALF == reach // _HALF
    axes = _joint_axes(pair, index)
    walk = _walk(axes, most, one_half)
    row = np.zeros((1, COLUMNS), np.int64)
    row[:, [DST, SRC, RESIDUAL, RING]] = _addresses(pair)
    row[:, INDEX] = first
    row[:, [INDEX_RUN, DST_STEP, SRC_STEP, INDEX_STEP]] = list(walk.inner)
    row[:, COUNT], row[:, INDEX_JUMP] = walk.length, walk.outer.place
    if pair.ring is not None:
        row[:, RING_STRIDE] = pair.ring[1]
    rows = _chunked(_spread(row, pair, axes), pair, most)
    return rows if one_half else _halved(rows, pair)


def _streams(pair: Pair) -> list[tuple[int, int, int]]:
    """List the streams: column of the address, column of the step, bytes of an element."""
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


def _spread(rows: Table, pair: Pair, axes: Sequence[_Axis]) -> Table:
    """One row for every index of some axes, from one row."""
    offsets = np.zeros((1, 3), np.int64)
    for n, *strides in axes:
        steps = np.arange(n, dtype=np.int64)[:, None] * np.array(strides, np.int64)
        offsets = (offsets[:, None, :] + steps[None, :, :]).reshape(-1, 3)
    rows = np.repeat(rows, len(offsets), axis=0)
    for column, step, size in _streams(pair):
        rows[:, column] += offsets[:, step - DST_STEP] * size
    rows[:, INDEX] += offsets[:, 2]
    return rows


def _chunked(rows: Table, pair: Pair, most: int) -> Table:
    """The rows cut into pieces of at most ``most`` elements."""
    count, run = rows[0, [COUNT, INDEX_RUN]]  # all rows of a tensor are alike
    if count <= most:
        return rows
    if count > run:  # every piece begins with a run, where that can be at a vector's first byte
        vectors = math.lcm(run, _VECTOR)
        most -= most % (vectors if vectors <= most else run)
    pieces = -(-count // most)
    first = np.tile(np.arange(pieces) * most, len(rows))
    return _clip_rows(np.repeat(rows, pieces, axis=0), pair, first, np.minimum(first + most, count))


def _halved(rows: Table, pair: Pair) -> Table:
    """The rows cut where the high half of the index changes; none has more than one run."""
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
    kept = end > first  # a step may be longer than a half
    return _clip_rows(cut[kept], pair, first[kept], end[kept])


def _clip_rows(rows: Table, pair: Pair, first: NDArray[np.int64], end: NDArray[np.int64]) -> Table:
    """Keep the elements of every row from one place up to another, in place."""
    for column, step, size in _streams(pair):
        rows[:, column] += first * rows[:, step] * size
    runs, rest = first // rows[:, INDEX_RUN], first % rows[:, INDEX_RUN]
    rows[:, INDEX] += runs * rows[:, INDEX_JUMP] + rest * rows[:, INDEX_STEP]
    rows[:, COUNT] = end - first
    return rows


def _pattern(group: Sequence[Pair], chunk: int | None) -> Table:
    """Rows of averages of one tensor: those that read one chunk of it follow each other."""
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
    """Most elements in a row of a GPU's table: a power of two that gives enough rows."""
    least, most = GPU_CHUNKS
    wanted = sum(pair.dst.size for pair in pairs) // GPU_ROWS
    return min(max(1 << wanted.bit_length(), least), most)


def numbered_tables(
    pairs: Iterable[Pair], together: int = 1, chunk: int | None = None
) -> dict[str, Rows]:
    """The tables of pairs of one dtype pair: ``"flat"`` (adjacent elements) and ``"strided"``.

    A layout without rows is left out. Dense tensors give flat rows whatever their order of axes, as
    long as both sides share it; where random bits are used, only parts in row-major order do.
    ``together`` averages of one tensor follow each other among the pairs, and so do the rows that
    read one chunk of it: it comes from memory once. A row has at most ``chunk`` elements, by
    default what suits a CPU.
    """
    pairs = list(pairs)
    numbers = [number for number, pair in enumerate(pairs) if pair.dst.size]
    if not numbers:
        return {}
    kept = [pairs[number] for number in numbers]
    groups = [kept[first : first + together] for first in range(0, len(kept), together)]
    # A model has many tensors and few shapes: those of one form differ in addresses and keys alone.
    firsts: dict[tuple[_Form, ...], int] = {}
    like = [firsts.setdefault(tuple(map(_form, one)), place) for place, one in enumerate(groups)]
    patterns = [_pattern(groups[place], chunk) for place in firsts.values()]
    form = np.searchsorted(list(firsts.values()), like)
    # Of every row: its group, its place in the group's pattern, its pair, and the pattern's pair.
    lengths = np.array([len(pattern) for pattern in patterns])
    count = lengths[form]
    group = np.repeat(np.arange(len(groups)), count)
    place = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)
    member = place % np.array([len(one) for one in groups])[group]  # the last may have fewer
    pair = group * together + member
    model = np.array(like)[group] * together + member
    table = np.concatenate(patterns)[(np.cumsum(lengths) - lengths)[form][group] + place]
    addresses = np.array([_addresses(one) for one in kept])
    table[:, [DST, SRC, RESIDUAL, RING]] += addresses[pair] - addresses[model]
    table[:, AVERAGE] = np.array([one.average_index for one in kept])[pair]
    table[:, KEY] = np.array([tensor_key(one) for one in kept])[pair]
    adjacent = (table[:, DST_STEP] == 1) & (table[:, SRC_STEP] == 1)
    adjacent &= (table[:, INDEX_STEP] <= 1) & (table[:, INDEX_JUMP] == 0)
    layouts = {"flat": adjacent, "strided": ~adjacent}
    return {
        layout: Rows(table[rows], np.array(numbers)[pair][rows])
        for layout, rows in layouts.items()
        if rows.any()
    }


def chunk_tables(
    pairs: Iterable[Pair], together: int = 1, chunk: int | None = None
) -> dict[str, Table]:
    """The tables of :func:`numbered_tables` alone."""
    found = numbered_tables(pairs, together, chunk)
    return {layout: rows.table for layout, rows in found.items()}


def moved_bytes(pairs: Sequence[Pair]) -> int:
    """Bytes of both sides together, by which work is shared out over threads."""
    return sum(p.dst.nbytes + p.src.nbytes for p in pairs)
