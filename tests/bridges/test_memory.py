"""New memory for tensors: of the right kind, in their order of axes, at cache lines of its own."""

from __future__ import annotations

import numpy as np
import pytest

from fastema.bridges.memory import allocate
from fastema.bridges.registry import describe
from fastema.layout.dtypes import DTYPES
from fastema.layout.flat import ALIGNMENT

BASE = np.arange(1.0, 121.0, dtype=np.float32).reshape(4, 5, 6)
# Tensors, and whether memory like them has their strides; else it is row-major.
LIKE = [
    *((BASE, True), (BASE.transpose(2, 0, 1), True), (np.array(2.5, np.float32), True)),
    *((BASE[:, ::2, 1:3], False), (BASE[::-1], False), (BASE[:, :0], False)),
    (np.broadcast_to(BASE[0, 0], (3, 6)), False),
]


@pytest.mark.parametrize("slots", [0, 1, 3])
@pytest.mark.parametrize("code", ["f32", "f64", "bool"])
def test_memory_is_like_the_tensors_it_is_for(code: str, slots: int) -> None:
    likes = [describe(array) for array, _ in LIKE]
    made = allocate([(like, DTYPES[code]) for like in likes], slots)
    for number, (like, (_, kept), (array, spec)) in enumerate(zip(likes, LIKE, made, strict=True)):
        assert spec == describe(array)
        assert spec.dtype == code
        assert not array.any()
        assert spec.shape == (slots,) * bool(slots) + like.shape
        if kept:
            assert spec.strides[bool(slots) :] == like.strides
        # Nothing overlaps, and no two share a cache line, nor do the slots of one.
        array[...] = number % 2
        for slot in [array[i, ...] for i in range(slots)] or [array]:
            assert not slot.size or (slot.ctypes.data - array.base.ctypes.data) % ALIGNMENT == 0
    for number, (array, _) in enumerate(made):
        assert (array == number % 2).all()
