"""Allocate tensors as views into a few flat buffers, and read their bytes."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np

from fastema.bridges.registry import bridge_of, describe, memory_of
from fastema.layout.dtypes import DType
from fastema.layout.flat import compute_offsets, dense_strides
from fastema.layout.flat import row_major as row_major_strides
from fastema.layout.spec import TensorSpec

__all__ = ["Memory", "allocate", "bytes_of", "row_major_on_host"]

Memory = tuple[Any, TensorSpec]
"""A view into a flat buffer, and its TensorSpec."""


def allocate(
    wanted: Iterable[tuple[TensorSpec, DType]],
    slots: int = 0,
    *,
    on_host: bool = False,
    row_major: bool = False,
) -> list[Memory]:
    """Allocate tensors with the shapes of given ones; return a view and a TensorSpec for each.

    There is one flat buffer per framework, device and dtype. Dense tensors keep their order of
    axes unless ``row_major`` is set, others become row-major.

    Parameters
    ----------
    wanted : iterable of (TensorSpec, DType)
        A tensor whose shape, framework and device to take, and the dtype to allocate.
    slots : int
        Length of a new first axis; 0 adds none.
    on_host : bool
        Allocate in host memory that the tensors' devices can read and write.
    """
    wanted = list(wanted)
    groups: dict[tuple[ModuleType, str, str], list[int]] = {}
    for i, (like, kind) in enumerate(wanted):
        groups.setdefault((memory_of(like.owner), like.device, kind.code), []).append(i)
    made: dict[int, Memory] = {}
    for (bridge, device, code), members in groups.items():
        itemsize = wanted[members[0]][1].itemsize
        # Slot after slot, or row-major one tensor after another.
        each, times = (max(slots, 1), 1) if row_major else (1, max(slots, 1))
        placed = compute_offsets([wanted[i][0].size * each for i in members], itemsize)
        where = "pinned" if on_host and device != "cpu" else device
        flat = bridge.zeros(placed.length * times, code, where)
        whole = describe(flat)
        for i, offset in zip(members, placed.offsets, strict=True):
            like, _ = wanted[i]
            shape, strides = like.shape, dense_strides(like)
            if slots:
                shape, strides = (slots, *shape), (placed.length, *strides)
            if row_major:
                strides = row_major_strides(shape)
            view = bridge.view(flat, offset, shape, strides)
            spec = whole.part(view, offset, shape, strides)
            if like.division is not None:
                spec = spec.sharded_like(like)
            made[i] = view, spec
    return [made[i] for i in range(len(wanted))]


def row_major_on_host(array: Any) -> Any:
    """Return an array row-major on the host, without a copy if it already is."""
    transfer = getattr(bridge_of(array), "transfer", None)
    there = array if transfer is None else transfer(array, "cpu")
    return there.contiguous() if hasattr(there, "contiguous") else np.asarray(there, order="C")


def bytes_of(array: Any) -> memoryview:
    """Return the bytes of a row-major host array, without a copy; valid while the array lives."""
    return describe(array).bytes()
