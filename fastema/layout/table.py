"""Chunk tables: a pair of tensors as rows of elements that a kernel walks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fastema.kernels.table import CHUNK, COLUMNS, COUNT, DST, DST_STEP, SRC, SRC_STEP
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

__all__ = ["Table", "chunk_tables"]

Table = NDArray[np.int64]

_Axis = tuple[int, int, int]
"""Extent, stride of the written side, stride of the other side; in elements of the format."""


def _joint_axes(dst: TensorSpec, src: TensorSpec) -> list[_Axis]:
    """The axes of both sides, outermost of the written side first, merged where both allow it."""
    parts = dst.kind.parts
    axes = [
        (n, d * parts, s * parts)
        for n, d, s in zip(dst.shape, dst.strides, src.strides, strict=True)
        if n != 1
    ]
    axes.sort(key=lambda axis: (-abs(axis[1]), -abs(axis[2])))
    if parts > 1:
        axes.append((parts, 1, 1))
    merged: list[_Axis] = []
    for n, d, s in axes:
        if merged:
            outer, outer_d, outer_s = merged[-1]
            if outer_d == n * d and outer_s == n * s:
                merged[-1] = (outer * n, d, s)
                continue
        merged.append((n, d, s))
    return merged or [(1, 1, 1)]


def _rows(pair: Pair) -> Table:
    """Rows of one pair: the axis that is walked inside a row, the others spread out over rows."""
    _, dst, src = pair
    axes = _joint_axes(dst, src)
    adjacent = [axis for axis in axes if axis[1:] == (1, 1)]
    # A long axis in a row beats adjacent elements in rows of a few.
    inner = adjacent[0] if adjacent and adjacent[0][0] >= 16 else max(axes)
    axes.remove(inner)
    offsets = np.zeros((1, 2), np.int64)
    for n, d, s in axes:
        steps = np.arange(n, dtype=np.int64)[:, None] * np.array([d, s], np.int64)
        offsets = (offsets[:, None, :] + steps[None, :, :]).reshape(-1, 2)
    parts = dst.kind.parts
    sizes = np.array([dst.kind.itemsize // parts, src.kind.itemsize // parts], np.int64)
    rows = np.empty((len(offsets), COLUMNS), np.int64)
    rows[:, [DST, SRC]] = np.array([dst.address, src.address], np.int64) + offsets * sizes
    rows[:, [COUNT, DST_STEP, SRC_STEP]] = inner
    return rows


def _chunked(rows: Table, dst_size: int, src_size: int) -> Table:
    """The rows cut into pieces of at most ``CHUNK`` elements."""
    pieces = -(-rows[:, COUNT] // CHUNK)
    cut = np.repeat(rows, pieces, axis=0)
    first = np.arange(len(cut)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    done = first * CHUNK
    cut[:, COUNT] = np.minimum(CHUNK, cut[:, COUNT] - done)
    cut[:, DST] += done * cut[:, DST_STEP] * dst_size
    cut[:, SRC] += done * cut[:, SRC_STEP] * src_size
    return cut


def chunk_tables(pairs: Iterable[Pair]) -> dict[str, Table]:
    """The tables of pairs of one dtype pair: ``"flat"`` (adjacent elements) and ``"strided"``.

    A layout without rows is left out. Dense tensors give flat rows whatever their order of axes, as
    long as both sides share it.
    """
    kept = [pair for pair in pairs if pair.dst.size]
    if not kept:
        return {}
    kind, other = kept[0].dst.kind, kept[0].src.kind
    rows = np.concatenate([_rows(pair) for pair in kept])
    rows = _chunked(rows, kind.itemsize // kind.parts, other.itemsize // other.parts)
    adjacent = (rows[:, DST_STEP] == 1) & (rows[:, SRC_STEP] == 1)
    split = {"flat": rows[adjacent], "strided": rows[~adjacent]}
    return {layout: np.ascontiguousarray(part) for layout, part in split.items() if len(part)}


def moved_bytes(pairs: Iterable[Pair]) -> int:
    """Bytes of both sides together, by which work is shared out over threads."""
    return sum(math.prod(p.dst.shape) * (p.dst.kind.itemsize + p.src.kind.itemsize) for p in pairs)
