"""Dtypes, tensors in memory, and flat buffers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema.errors import DTypeError
from fastema.kernels.formats import FORMATS
from fastema.layout.dtypes import DTYPES, average_of, dtype, parse, raw
from fastema.layout.flat import dense_strides
from fastema.layout.spec import TensorSpec

from ..support import reference


def spec(shape: tuple[int, ...], strides: tuple[int, ...], code: str = "f32") -> TensorSpec:
    return TensorSpec(1 << 20, shape, strides, code, "cpu")


AXES = st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9)), max_size=4)


@given(AXES, st.sampled_from(["f32", "bf16", "c128", "bool"]))
def test_a_span_holds_every_element_and_dense_is_one_stretch_without_gaps(
    axes: list[tuple[int, int]], code: str
) -> None:
    one = spec(tuple(n for n, _ in axes), tuple(s for _, s in axes), code)
    size, indices = one.kind.itemsize, product(*(range(n) for n in one.shape))
    found = sorted(
        one.address + size * sum(i * s for i, s in zip(index, one.strides, strict=True))
        for index in indices
    )
    assert (one.size, one.nbytes) == (len(found), len(found) * size)
    first, after = one.span()
    if not found:
        assert first == after
        return
    assert (first, after) == (found[0], found[-1] + size)
    stretch = list(range(one.address, one.address + size * one.size, size))
    if one.dense:
        assert found == stretch
    elif all(stride >= 0 for _, stride in axes):
        assert found != stretch


@pytest.mark.parametrize(
    ("shape", "strides", "want"),
    [
        ((2, 3), (6, 2), (3, 1)),
        ((2, 3), (0, 1), (3, 1)),
        ((4,), (-1,), (1,)),
        ((3, 3), (1, 1), (3, 1)),
        ((2, 0, 3), (9, 9, 9), (3, 3, 1)),
    ],
)
def test_gaps_and_repetitions_are_not_dense_and_become_row_major(
    shape: tuple[int, ...], strides: tuple[int, ...], want: tuple[int, ...]
) -> None:
    assert not spec(shape, strides).dense or 0 in shape
    assert dense_strides(spec(shape, strides)) == want


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_has_its_kernel_formats(code: str) -> None:
    kind = dtype(code)
    assert parse(code) is kind
    assert kind.code == code
    assert FORMATS[raw(kind)].itemsize * kind.parts == kind.itemsize
    if kind.real is not None:
        assert FORMATS[kind.real].itemsize * kind.parts == kind.itemsize
        assert reference.real_of(code) == kind.real
        assert np.dtype(reference.FLOATS[kind.real].storage).itemsize * kind.parts == kind.itemsize


@pytest.mark.parametrize(
    ("weights", "wanted", "average"),
    [
        *(("bf16", None, "bf16"), ("bf16", "f32", "f32"), ("f64", "f16", "f16")),
        *(("c64", None, "c64"), ("c64", "f64", "c128"), ("c128", "f32", "c64")),
        *(("c64", "c128", "c128"), ("i64", None, "i64")),
        *(("f32", "i32", None), ("f32", "c64", None), ("c64", "f16", None), ("c128", "bf16", None)),
    ],
)
def test_an_average_has_the_dtype_that_is_wanted_if_it_can_hold_it(
    weights: str, wanted: str | None, average: str | None
) -> None:
    chosen = None if wanted is None else dtype(wanted)
    if average is not None:
        assert average_of(dtype(weights), chosen) == dtype(average)
        return
    with pytest.raises(DTypeError, match=wanted):
        average_of(dtype(weights), chosen)
