"""A chunk table names every pair of elements once, and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastema.kernels.table import (
    AVERAGE,
    CHUNK,
    COLUMNS,
    COUNT,
    DST,
    DST_STEP,
    INDEX,
    INDEX_JUMP,
    INDEX_RUN,
    INDEX_STEP,
    KEY,
    RESIDUAL,
    RING,
    RING_STRIDE,
    SHARED_CHUNK,
    SRC,
    SRC_STEP,
)
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
        adjacent &= (rows[:, INDEX_STEP] <= 1) & (rows[:, INDEX_JUMP] == 0)
        assert adjacent.all() if layout == "flat" else not adjacent.any()
        assert not rows[:, [RESIDUAL, RING, RING_STRIDE]].any()
    return tables


def columns(rows: np.ndarray, base: int, size: int, step: int) -> list[int]:
    """What a column of addresses, and how far they are apart, make of every element."""
    return [int(row[base] + i * row[step] * size) for row in rows for i in range(row[COUNT])]


def indices(pair: Pair) -> dict[int, int]:
    """Address of each written element to its index in the whole tensor, if none is written twice.

    No row has indices of two high halves.
    """
    size = pair.dst.kind.itemsize // pair.dst.kind.parts
    found: dict[int, int] = {}
    for layout, rows in table.chunk_tables([pair]).items():
        for row in rows.tolist():
            runs = [divmod(i, row[INDEX_RUN]) for i in range(row[COUNT])]
            mine = [row[INDEX] + n * row[INDEX_JUMP] + i * row[INDEX_STEP] for n, i in runs]
            assert len({index >> 32 for index in mine}) == 1
            if layout == "flat":
                assert mine == list(range(row[INDEX], row[INDEX] + row[COUNT]))
            addresses = [row[DST] + i * row[DST_STEP] * size for i in range(row[COUNT])]
            found |= dict(zip(addresses, mine, strict=True))
    return found


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
    pair = Pair("t", dst, src)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CHUNK", chunk)
        check([pair], chunk)


EXTENTS = st.one_of(st.integers(0, 5), st.integers(2**16 - 3, 2**16), st.integers(2**33, 2**34))


@given(
    st.lists(st.tuples(st.integers(0, 5), EXTENTS, EXTENTS), max_size=4),
    st.permutations(range(4)),
    st.permutations(range(4)),
    st.lists(st.sampled_from([1, 2, 3, -1]), min_size=4, max_size=4),
    st.sampled_from([3, 16, 50, CHUNK]),
)
def test_indices_are_those_in_the_whole_tensor_in_row_major_order(
    axes: list[tuple[int, int, int]],
    to: list[int],
    of: list[int],
    spread: list[int],
    chunk: int,
) -> None:
    shape = tuple(n for n, _, _ in axes)
    offset = tuple(before for _, before, _ in axes)
    whole = tuple(sum(parts) for parts in axes)
    assume(math.prod(whole) < 2**62)

    def side(order: list[int], code: str, address: int) -> TensorSpec:
        order = [axis for axis in order if axis < len(shape)]
        strides = [0] * len(shape)
        step = 1
        for axis in reversed(order):
            strides[axis] = step * spread[axis]
            step *= shape[axis] * abs(spread[axis])
        return TensorSpec(address, shape, tuple(strides), code, "cpu", True, whole, offset)

    pair = Pair("t", side(to, "bf16", 1 << 40), side(of, "f32", 1 << 50), "bf16~")
    strides = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
    # A table has a row for every 2**32 indices between the first and the last: a few thousand here.
    assume(sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) < 2**43)
    want = {
        address: sum((i + o) * s for i, o, s in zip(index, offset, strides, strict=True))
        for address, index in zip(
            elements(pair.dst), product(*(range(n) for n in shape)), strict=True
        )
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CHUNK", chunk)
        check([pair], chunk)
        assert indices(pair) == want
        bare = pair._replace(dst=replace(pair.dst, whole=None, offset=None))
        assert indices(bare) == want


@pytest.mark.parametrize(
    ("shape", "order", "rows"),
    [
        ((512, 512, 3, 3), (0, 2, 3, 1), 512),  # all that one of the outermost axis has
        ((64, 3, 7, 7), (0, 2, 3, 1), 64),
        ((512, 2, 2, 2), (0, 2, 3, 1), 2),  # too short: along the long axis
        ((1000, 2000), (1, 0), 31),  # whole runs of 1,000
        ((8, 70_000), (1, 0), 9),  # runs of 8
        ((70_000, 8), (1, 0), 16),  # runs that are too long for a chunk
    ],
)
def test_random_rows_are_long_in_every_order_of_memory(
    shape: tuple[int, ...], order: tuple[int, ...], rows: int
) -> None:
    pair = Pair("t", dense(shape, order, "bf16", 64), dense(shape, order, "bf16", 1 << 40))
    (plain,) = table.chunk_tables([pair]).values()
    assert len(plain) == -(-math.prod(shape) // CHUNK)
    tables = table.chunk_tables([pair._replace(form="bf16~")])
    assert {layout: len(rows) for layout, rows in tables.items()} == {"strided": rows}


def test_a_shard_of_columns_has_rows_of_a_whole_chunk() -> None:
    strides = 1000, 1
    part = TensorSpec(64, (4096, 1000), strides, "bf16", "cpu", True, (4096, 4000), (0, 1000))
    rows = table.chunk_tables([Pair("t", part, part, "bf16~")])["strided"]
    assert len(rows) == 64  # of 65 runs each, so that all begin at a multiple of 16 bytes
    assert not (rows[:, DST] % 16).any()


def test_a_shard_of_rows_is_one_stretch() -> None:
    part = TensorSpec(64, (40, 50), (50, 1), "bf16", "cpu", True, (4096, 50), (80, 0))
    (row,) = table.chunk_tables([Pair("t", part, part, "bf16~")])["flat"]
    assert row[[COUNT, INDEX, INDEX_STEP]].tolist() == [2000, 4000, 1]


def test_indices_are_zero_without_random_bits() -> None:
    spec = TensorSpec(64, (40, 50), (1, 40), "bf16", "cpu", True, (4096, 50), (80, 0))
    (row,) = table.chunk_tables([Pair("t", spec, spec)])["flat"]
    assert not row[[INDEX, INDEX_STEP, INDEX_JUMP]].any()


@given(AXES, st.sampled_from(CODES[:4]), st.sampled_from([3, 7, CHUNK]))
def test_companion_and_ring_lie_as_the_average_does(
    axes: list[tuple[int, int, int]], codes: tuple[str, str], chunk: int
) -> None:
    shape = tuple(n for n, _, _ in axes)
    strides = tuple(d for _, d, _ in axes)
    dst = TensorSpec(1 << 20, shape, strides, codes[0], "cpu")
    src = TensorSpec(1 << 30, shape, tuple(s for _, _, s in axes), codes[1], "cpu")
    residual = TensorSpec(1 << 40, shape, strides, "c128" if dst.kind.parts == 2 else "f64", "cpu")
    slot = TensorSpec(1 << 50, shape, strides, "c64" if dst.kind.parts == 2 else "bf16", "cpu")
    pair = Pair("t", dst, src, residual=residual, ring=(slot, 4000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "SHARED_CHUNK", chunk)
        tables = table.chunk_tables([pair])
    found = Counter()
    for rows in tables.values():
        assert (rows[:, COUNT] <= chunk).all()
        assert (rows[:, RING_STRIDE] == 4000).all()
        parts = [
            columns(rows, base, spec.kind.itemsize // spec.kind.parts, step)
            for base, step, spec in (
                (DST, DST_STEP, dst),
                (SRC, SRC_STEP, src),
                (RESIDUAL, DST_STEP, residual),
                (RING, DST_STEP, slot),
            )
        ]
        found += Counter(zip(*parts, strict=True))
    want = Counter(zip(*(elements(spec) for spec in (dst, src, residual, slot)), strict=True))
    assert found == want


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


def averages(count: int, shape: tuple[int, ...], name: str, address: int) -> list[Pair]:
    """Several averages of one tensor."""
    order = tuple(range(len(shape)))
    src = dense(shape, order, "f32", address)
    return [
        Pair(
            name, dense(shape, order, "f32", address + (1 + index << 30)), src, average_index=index
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("size", [1, SHARED_CHUNK, 3 * SHARED_CHUNK + 5])
def test_rows_that_read_one_chunk_follow_each_other(size: int) -> None:
    pairs = averages(3, (size,), "a", 1 << 40) + averages(3, (0,), "none", 1 << 43)
    pairs += averages(3, (2, 7), "b", 1 << 44)
    (rows,) = table.chunk_tables(pairs, together=3).values()
    assert len(rows) == 3 * (-(-size // SHARED_CHUNK) + 1)
    for first in range(0, len(rows), 3):
        claimed = rows[first : first + 3]
        np.testing.assert_array_equal(claimed[:, AVERAGE], [0, 1, 2])
        assert len({*claimed[:, DST].tolist()}) == len({*claimed[:, KEY].tolist()}) == 3
        for column in (SRC, COUNT, INDEX, INDEX_STEP):
            assert len({*claimed[:, column].tolist()}) == 1
    for pair in pairs:
        mine = rows[(rows[:, KEY] == table.tensor_key(pair))]
        assert mine[:, COUNT].sum() == pair.dst.size
        assert columns(mine, DST, 4, DST_STEP) == elements(pair.dst)
        assert columns(mine, SRC, 4, SRC_STEP) == elements(pair.src)


def test_keys_tell_tensors_apart_and_nothing_else() -> None:
    def key(pair: Pair) -> int:
        (rows,) = table.chunk_tables([pair]).values()
        (found,) = {*rows[:, KEY].tolist()}
        return int(found)

    one = Pair("layer.weight", dense((70,), (0,), "f32", 1 << 20), dense((70,), (0,), "f32", 64))
    assert 0 < key(one) < 1 << 32
    elsewhere = dense((2 * CHUNK,), (0,), "bf16", 1 << 40)
    assert key(one._replace(dst=elsewhere, src=elsewhere)) == key(one)
    others = [
        one._replace(name=f"layer.{i}.weight", average_index=w) for i in range(50) for w in range(3)
    ]
    assert len({key(one), *map(key, others)}) == 151


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


@given(
    st.lists(
        st.tuples(
            st.sampled_from([(0,), (1,), (5,), (3, 7), (2, 0), (4, 3, 2), (130,), ()]),
            st.booleans(),
        ),
        max_size=7,
    ),
    st.integers(1, 3),
    st.integers(1, 40),
)
def test_every_row_is_numbered_by_its_pair(
    tensors: list[tuple[tuple[int, ...], bool]], together: int, chunk: int
) -> None:
    pairs = []
    for i, (shape, spread) in enumerate(tensors):
        order = tuple(range(len(shape)))
        src = dense(shape, order, "f32", (i + 1) << 40)
        if spread and len(shape) > 1:
            src = dense(shape, order[::-1], "f32", (i + 1) << 40)
        for index in range(together):
            dst = dense(shape, order, "f32", ((i + 1) << 40) + ((index + 1) << 30))
            pairs.append(Pair(f"t{i}", dst, src, average_index=index))
    tables = table.numbered_tables(pairs, together, chunk)
    plain = table.chunk_tables(pairs, together, chunk)
    assert list(tables) == list(plain)
    seen: Counter[int] = Counter()
    for layout, (rows, numbers) in tables.items():
        np.testing.assert_array_equal(rows, plain[layout])
        assert numbers.shape == (len(rows),)
        for row, number in zip(rows, numbers, strict=True):
            pair = pairs[number]
            assert row[KEY] == table.tensor_key(pair)
            assert row[AVERAGE] == pair.average_index
            for column, side in ((DST, pair.dst), (SRC, pair.src)):
                assert 0 <= row[column] - side.address < max(side.nbytes, 1)
            seen[int(number)] += int(row[COUNT])
    assert seen == {i: pair.dst.size for i, pair in enumerate(pairs) if pair.dst.size}
