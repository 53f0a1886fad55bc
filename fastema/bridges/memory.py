"""Memory of tensors: allocated in a few flat buffers, and seen as bytes."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np

from fastema.bridges.registry import bridge_of, describe, memory_of
from fastema.layout.dtypes import DType
from fastema.layout.flat import dense_strides, place
from fastema.layout.spec import TensorSpec

__all__ = ["Memory", "allocate", "bytes_of", "row_major_on_host"]

Memory = tuple[Any, TensorSpec]
"""A view into a flat buffer, and its description."""


def allocate(
    wanted: Iterable[tuple[TensorSpec, DType]], slots: int = 0, *, on_host: bool = False
) -> list[Memory]:
    """Allocate memory for tensors like these, each with its own dtype: views and descriptions.

    One flat buffer per framework, device and dtype; dense tensors keep their order of axes, others
    become row-major. ``slots`` is the length of a new first axis, 0 for none; ``on_host`` takes
    memory of the host that the tensors' devices can read and write.
    """
    wanted = list(wanted)
    groups: dict[tuple[ModuleType, str, str], list[int]] = {}
    for i, (like, kind) in enumerate(wanted):
        groups.setdefault((memory_of(like.owner), like.device, kind.code), []).append(i)
    made: dict[int, Memory] = {}
    for (bridge, device, code), members in groups.items():
        itemsize = wanted[members[0]][1].itemsize
        placed = place([wanted[i][0].size for i in members], itemsize)
        where = "pinned" if on_host and device != "cpu" else device
        flat = bridge.zeros(placed.length * max(slots, 1), code, where)
        whole = describe(flat)
        for i, offset in zip(members, placed.offsets, strict=True):
            like, _ = wanted[i]
            shape, strides = like.shape, dense_strides(like)
            if slots:
                shape, strides = (slots, *shape), (placed.length, *strides)
            view = bridge.view(flat, offset, shape, strides)
            spec = whole.part(view, offset, shape, strides)
            if like.division is not None:
                spec = spec.divided_like(like)
            made[i] = view, spec
    return [made[i] for i in range(len(wanted))]


def row_major_on_host(array: Any) -> Any:
    """Return an array of torch or NumPy on the host and row-major: itself where it is so."""
    there = bridge_of(array).transfer(array, "cpu")
    return there.contiguous() if hasattr(there, "contiguous") else np.asarray(there, order="C")


def bytes_of(array: Any) -> memoryview:
    """Return the bytes of a row-major array on the host, valid for as long as it is kept."""
    return describe(array).bytes()
