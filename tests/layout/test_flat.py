from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema.layout.flat import ALIGNMENT, dense_strides, place
from fastema.layout.spec import TensorSpec


@given(st.lists(st.integers(0, 200)), st.sampled_from([1, 2, 4, 8, 16]))
def test_tensors_begin_at_lines_and_do_not_touch(sizes: list[int], itemsize: int) -> None:
    length, offsets = place(sizes, itemsize)
    assert len(offsets) == len(sizes)
    assert all(offset * itemsize % ALIGNMENT == 0 for offset in offsets)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    assert all(end <= begin for end, begin in zip(ends, offsets[1:], strict=False))
    assert length >= max(ends, default=0)
    # Less than a line is lost per tensor.
    assert length - sum(sizes) <= len(sizes) * ALIGNMENT // itemsize


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_dense_tensors_keep_their_order_of_axes(order: tuple[int, ...]) -> None:
    array = np.empty((2, 3, 4), np.float32).transpose(order)
    strides = tuple(step // 4 for step in array.strides)
    assert dense_strides(TensorSpec(64, array.shape, strides, "f32", "cpu")) == strides


@pytest.mark.parametrize(
    ("shape", "strides", "want"),
    [
        ((2, 3), (6, 2), (3, 1)),
        ((2, 3), (0, 1), (3, 1)),
        ((4,), (-1,), (1,)),
        ((2, 0, 3), (9, 9, 9), (3, 3, 1)),
    ],
)
def test_others_become_row_major(
    shape: tuple[int, ...], strides: tuple[int, ...], want: tuple[int, ...]
) -> None:
    assert dense_strides(TensorSpec(64, shape, strides, "f32", "cpu")) == want
