"""Flat buffers: many tensors of one dtype in one allocation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.layout.spec import TensorSpec

__all__ = ["ALIGNMENT", "Placement", "aligned_empty", "dense_strides", "place", "row_major"]

ALIGNMENT: Final = 64
"""Bytes: every tensor begins at a cache line of its own, so that threads never share one."""


class Placement(NamedTuple):
    """Places of tensors in a flat buffer: its length and each one's offset, in elements."""

    length: int
    offsets: list[int]


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory that begins at :data:`ALIGNMENT`: JAX takes it for an array's without a copy."""
    size = dtype.itemsize * math.prod(shape)
    raw = np.empty(size + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)


def dense_strides(spec: TensorSpec) -> tuple[int, ...]:
    """Strides of a gapless copy in the same order of axes (row-major where the spec has gaps)."""
    return spec.strides if spec.dense else row_major(spec.shape)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of an array without gaps whose last axis is adjacent, in elements."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def place(sizes: Sequence[int], itemsize: int) -> Placement:
    """Offsets for tensors of these sizes (in elements), each aligned to :data:`ALIGNMENT` bytes."""
    unit = max(ALIGNMENT // itemsize, 1)
    offsets, length = [], 0
    for size in sizes:
        offsets.append(length)
        length += -(-size // unit) * unit
    return Placement(length, offsets)
