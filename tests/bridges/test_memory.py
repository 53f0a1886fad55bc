"""New memory for tensors: of the right kind, in their order of axes, at cache lines of its own."""

from __future__ import annotations

import numpy as np
import pytest

from fastema.bridges.memory import allocate
from fastema.bridges.registry import describe
from fastema.layout.dtypes import DTYPES
from fastema.layout.flat import ALIGNMENT

BASE = np.arange(1.0, 121.0, dtype=np.float32).reshape(4, 5, 6)
LIKE = {
    "plain": BASE,
    "transposed": BASE.transpose(2, 0, 1),
    "gaps": BASE[:, ::2, 1:3],
    "backwards": BASE[::-1],
    "expanded": np.broadcast_to(BASE[0, 0], (3, 6)),
    "0-dim": np.array(2.5, np.float32),
    "empty": BASE[:, :0],
    "one": np.ones(1, np.float32),
}
ROW_MAJOR = {"gaps", "backwards", "expanded"}


@pytest.mark.parametrize("slots", [0, 1, 3])
@pytest.mark.parametrize("code", ["f32", "f64", "bool"])
def test_memory_is_like_the_tensors_it_is_for(code: str, slots: int) -> None:
    likes = {name: describe(array) for name, array in LIKE.items()}
    made = allocate([(like, DTYPES[code]) for like in likes.values()], slots)
    for (name, like), (array, spec) in zip(likes.items(), made, strict=True):
        assert spec == describe(array)
        assert spec.dtype == code
        assert not array.any()
        shape, strides = (spec.shape[1:], spec.strides[1:]) if slots else (spec.shape, spec.strides)
        assert shape == like.shape
        if name not in ROW_MAJOR and like.size > 1:
            assert strides == like.strides
        if slots and like.size:
            # Every slot lies as the tensor would alone, as far from the next as all others are.
            assert spec.shape[0] == slots
            assert spec.strides[0] >= like.size


@pytest.mark.parametrize("slots", [0, 2])
def test_nothing_overlaps_and_lines_are_not_shared(slots: int) -> None:
    likes = [describe(np.ones(n, np.float32)) for n in (1, 15, 16, 17, 100)]
    kinds = [DTYPES[code] for code in ("f32", "f64", "f32", "bool", "f32")]
    made = allocate(zip(likes, kinds, strict=True), slots)
    for number, (array, _) in enumerate(made, 1):
        array[...] = number % 2
        for slot in array if slots else [array]:
            assert (slot.ctypes.data - array.base.ctypes.data) % ALIGNMENT == 0
    for number, (array, _) in enumerate(made, 1):
        assert (array == number % 2).all()
