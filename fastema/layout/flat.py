"""Flat buffers: many tensors of one dtype in one allocation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.layout.spec import TensorSpec

__all__ = [
    "ALIGNMENT",
    "FlatLayout",
    "aligned_empty",
    "compute_offsets",
    "dense_strides",
    "row_major",
]

ALIGNMENT: Final = 64
"""Bytes. Every tensor starts on its own cache line, so that threads never share one."""


HUGE_PAGE: Final = 1 << 21
"""Bytes of a huge page on x86 and most ARM systems."""


class FlatLayout(NamedTuple):
    """Length of a flat buffer and the offset of each tensor in it, in elements."""

    length: int
    offsets: list[int]


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an empty array aligned to :data:`ALIGNMENT`: JAX adopts its memory without a copy.

    Large ones begin with a huge page. NumPy asks Linux for such pages; with the usual 4 KiB,
    looking up addresses costs a tenth of an update's time. The bytes before are never touched, so
    they take up no memory.
    """
    size = dtype.itemsize * math.prod(shape)
    alignment = ALIGNMENT if size < 2 * HUGE_PAGE else HUGE_PAGE
    raw = np.empty(size + alignment, np.uint8)
    first = -raw.ctypes.data % alignment
    return raw[first : first + size].view(dtype).reshape(shape)


def dense_strides(spec: TensorSpec) -> tuple[int, ...]:
    """Return strides for a dense copy: the spec's own if it is dense, otherwise row-major."""
    return spec.strides if spec.dense else row_major(spec.shape)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a row-major (C-contiguous) array, in elements."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def compute_offsets(sizes: Sequence[int], itemsize: int) -> FlatLayout:
    """Return aligned offsets in a flat buffer for tensors of these sizes, all in elements."""
    unit = max(ALIGNMENT // itemsize, 1)
    offsets, length = [], 0
    for size in sizes:
        offsets.append(length)
        length += -(-size // unit) * unit
    return FlatLayout(length, offsets)
