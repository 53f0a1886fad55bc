"""A chunk table names every pair of elements once, and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema.kernels.table import CHUNK, COLUMNS, COUNT, DST, DST_STEP, SRC, SRC_STEP
from fastema.layout import table
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

CODES = [("f32", "f32"), ("f32", "bf16"), ("f16", "f64"), ("c64", "c128"), ("bool", "bool")]


def elements(one: TensorSpec) -> list[int]:
    """Addresses of all reals, by index."""
    parts = one.kind.parts
    return [
        one.address
        + one.kind.itemsize * sum(i * s for i, s in zip(index, one.strides, strict=True))
        + part * (one.kind.itemsize // parts)
        for index in product(*(range(n) for n in one.shape))
        for part in range(parts)
    ]


def named(pairs: list[Pair]) -> tuple[Counter[tuple[int, int]], dict[str, np.ndarray]]:
    """The pairs of addresses that the tables of some pairs name, and the tables."""
    tables = table.chunk_tables(pairs)
    kind, other = pairs[0].dst.kind, pairs[0].src.kind
    to_size, of_size = kind.itemsize // kind.parts, other.itemsize // other.parts
    found = Counter(
        (int(row[DST] + i * row[DST_STEP] * to_size), int(row[SRC] + i * row[SRC_STEP] * of_size))
        for rows in tables.values()
        for row in rows
        for i in range(row[COUNT])
    )
    return found, tables


def check(pairs: list[Pair], chunk: int = CHUNK) -> dict[str, np.ndarray]:
    want = Counter(
        both for pair in pairs for both in zip(elements(pair.dst), elements(pair.src), strict=True)
    )
    found, tables = named(pairs)
    assert found == want
    for layout, rows in tables.items():
        assert rows.shape[1] == COLUMNS
        assert rows.dtype == np.int64
        assert rows.flags.c_contiguous
        assert (rows[:, COUNT] > 0).all()
        assert (rows[:, COUNT] <= chunk).all()
        adjacent = (rows[:, DST_STEP] == 1) & (rows[:, SRC_STEP] == 1)
        assert adjacent.all() if layout == "flat" else not adjacent.any()
    return tables


def dense(shape: tuple[int, ...], order: tuple[int, ...], code: str, address: int) -> TensorSpec:
    strides = [0] * len(shape)
    step = 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return TensorSpec(address, shape, tuple(strides), code, "cpu")


AXES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(-40, 40).filter(bool), st.integers(-40, 40)),
    max_size=4,
)


@given(AXES, st.sampled_from(CODES), st.sampled_from([3, 7, CHUNK]))
def test_any_strides(axes: list[tuple[int, int, int]], codes: tuple[str, str], chunk: int) -> None:
    shape = tuple(n for n, _, _ in axes)
    dst = TensorSpec(1 << 20, shape, tuple(d for _, d, _ in axes), codes[0], "cpu")
    src = TensorSpec(1 << 30, shape, tuple(s for _, _, s in axes), codes[1], "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CHUNK", chunk)
        check([Pair("t", dst, src)], chunk)


@given(st.permutations(range(3)), st.permutations(range(3)), st.sampled_from(CODES))
def test_any_orders_of_axes(
    to: tuple[int, ...], of: tuple[int, ...], codes: tuple[str, str]
) -> None:
    shape = (18, 3, 4)
    pair = Pair("t", dense(shape, to, codes[0], 1 << 20), dense(shape, of, codes[1], 1 << 30))
    tables = check([pair])
    if to == of:
        assert [len(rows) for rows in tables.values()] == [1]
        assert "flat" in tables


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_long_rows_are_cut(size: int) -> None:
    pair = Pair("t", dense((size,), (0,), "f32", 1 << 20), dense((size,), (0,), "bf16", 1 << 30))
    (rows,) = table.chunk_tables([pair]).values()
    assert len(rows) == -(-size // CHUNK)
    assert rows[:, COUNT].sum() == size
    begins = np.arange(len(rows)) * CHUNK
    np.testing.assert_array_equal(rows[:, DST], (1 << 20) + 4 * begins)
    np.testing.assert_array_equal(rows[:, SRC], (1 << 30) + 2 * begins)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_dense_tensors_are_one_stretch_in_any_order(order: tuple[int, ...]) -> None:
    shape = (9, 1, 8, 7)
    pair = Pair("t", dense(shape, order, "f32", 1 << 20), dense(shape, order, "f32", 1 << 30))
    tables = check([pair])
    assert list(tables) == ["flat"]
    np.testing.assert_array_equal(tables["flat"][:, COUNT], [math.prod(shape)])


def test_what_is_empty_takes_no_row() -> None:
    empty = Pair("e", dense((0, 3), (0, 1), "f32", 0), dense((0, 3), (0, 1), "f32", 0))
    full = Pair("f", dense((), (), "f32", 1 << 20), dense((), (), "f32", 1 << 30))
    assert table.chunk_tables([]) == {}
    assert table.chunk_tables([empty]) == {}
    assert len(check([empty, full])["flat"]) == 1


def test_flat_and_strided_rows_lie_apart() -> None:
    flat = Pair("f", dense((40,), (0,), "f32", 1 << 20), dense((40,), (0,), "f32", 1 << 30))
    gaps = TensorSpec(1 << 22, (40,), (2,), "f32", "cpu")
    spread = Pair("s", gaps, dense((40,), (0,), "f32", 1 << 31))
    tables = check([flat, spread])
    assert {layout: len(rows) for layout, rows in tables.items()} == {"flat": 1, "strided": 1}


def test_rows_of_a_slice_are_walked_along_its_long_axis() -> None:
    # 1,000 rows of 3 adjacent elements: 3 rows of 1,000 spaced ones take fewer steps.
    shape, strides = (1000, 3), (8, 1)
    dst = TensorSpec(1 << 20, shape, strides, "f32", "cpu")
    src = TensorSpec(1 << 30, shape, strides, "f32", "cpu")
    assert len(check([Pair("t", dst, src)])["strided"]) == 3


def test_bytes_of_both_sides() -> None:
    pair = Pair("t", dense((10, 3), (0, 1), "f32", 64), dense((10, 3), (0, 1), "bf16", 4096))
    assert table.moved_bytes([pair, pair]) == 2 * 30 * 6
