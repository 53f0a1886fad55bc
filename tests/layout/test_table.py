"""A chunk table lists every pair of elements once, and nothing else."""

import math
from collections import Counter
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fastema.kernels import table as abi
from fastema.kernels.table import CHUNK, SHARED_CHUNK
from fastema.layout import table
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

CODES = [("f32", "f32"), ("f32", "bf16"), ("f16", "f64"), ("c64", "c128"), ("bool", "bool")]


def elements(one: TensorSpec) -> list[int]:
    """Return the addresses of all real numbers, in index order."""
    parts = one.kind.parts
    return [
        one.address
        + one.kind.itemsize * sum(i * s for i, s in zip(index, one.strides, strict=True))
        + part * (one.kind.itemsize // parts)
        for index in product(*(range(n) for n in one.shape))
        for part in range(parts)
    ]


def addresses_of(rows: np.ndarray, base: int, step: int, spec: TensorSpec) -> list[int]:
    """Return every element's address, from a column of base addresses and one of steps."""
    size = spec.kind.itemsize // spec.kind.parts
    return [int(row[base] + i * row[step] * size) for row in rows for i in range(row[abi.COUNT])]


def check_tables(pairs: list[Pair], chunk: int = CHUNK) -> dict[str, np.ndarray]:
    """Return the tables of pairs of one dtype; assert that they list exactly their elements."""
    want = Counter(
        both for pair in pairs for both in zip(elements(pair.dst), elements(pair.src), strict=True)
    )
    tables, found = table.build_tables(pairs), Counter[tuple[int, int]]()
    for layout, rows in tables.items():
        dst = addresses_of(rows, abi.DST, abi.DST_STEP, pairs[0].dst)
        found.update(zip(dst, addresses_of(rows, abi.SRC, abi.SRC_STEP, pairs[0].src), strict=True))
        assert rows.shape[1] == abi.COLUMNS
        assert rows.dtype == np.int64
        assert rows.flags.c_contiguous
        assert (rows[:, abi.COUNT] > 0).all()
        assert (rows[:, abi.COUNT] <= chunk).all()
        adjacent = (rows[:, abi.DST_STEP] == 1) & (rows[:, abi.SRC_STEP] == 1)
        adjacent &= (rows[:, abi.INDEX_STEP] <= 1) & (rows[:, abi.INDEX_JUMP] == 0)
        assert adjacent.all() if layout == "flat" else not adjacent.any()
        assert not rows[:, [abi.RESIDUAL, abi.RING, abi.RING_STRIDE]].any()
    assert found == want
    return tables


def indices_by_address(pair: Pair) -> dict[int, int]:
    """Map the address of each written element, none of them twice, to its index in the tensor.

    Assert that the indices of a row share their high half.
    """
    found: dict[int, int] = {}
    for layout, rows in table.build_tables([pair]).items():
        for row in rows:
            runs = [divmod(i, int(row[abi.INDEX_RUN])) for i in range(row[abi.COUNT])]
            first, jump, step = row[[abi.INDEX, abi.INDEX_JUMP, abi.INDEX_STEP]].tolist()
            mine = [first + n * jump + i * step for n, i in runs]
            assert len({index >> 32 for index in mine}) == 1
            if layout == "flat":
                assert mine == list(range(first, first + len(runs)))
            addresses = addresses_of(row[None], abi.DST, abi.DST_STEP, pair.dst)
            found |= dict(zip(addresses, mine, strict=True))
    return found


def dense_spec(
    shape: tuple[int, ...], code: str, address: int, order: tuple[int, ...] | None = None
) -> TensorSpec:
    strides, step = [0] * len(shape), 1
    for axis in reversed(range(len(shape)) if order is None else order):
        strides[axis] = step
        step *= shape[axis]
    return TensorSpec(address, shape, tuple(strides), code, "cpu")


AXES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(-40, 40).filter(bool), st.integers(-40, 40)),
    max_size=4,
)


@given(AXES, st.sampled_from(CODES), st.sampled_from([3, 7, CHUNK]))
def test_tables_list_pairs_of_any_strides_with_their_companions(
    axes: list[tuple[int, int, int]], codes: tuple[str, str], chunk: int
) -> None:
    shape, strides = tuple(n for n, _, _ in axes), tuple(d for _, d, _ in axes)
    dst = TensorSpec(1 << 20, shape, strides, codes[0], "cpu")
    src = TensorSpec(1 << 30, shape, tuple(s for _, _, s in axes), codes[1], "cpu")
    pair = Pair("t", dst, src)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CHUNK", chunk)
        check_tables([pair], chunk)
    if codes[0] == "bool":
        return
    residual = TensorSpec(1 << 40, shape, strides, "c128" if dst.kind.parts == 2 else "f64", "cpu")
    slot = TensorSpec(1 << 50, shape, strides, "c64" if dst.kind.parts == 2 else "bf16", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "SHARED_CHUNK", chunk)
        tables = table.build_tables([pair._replace(residual=residual, ring=(slot, 4000))])
    found = Counter[tuple[int, ...]]()
    sides = {abi.DST: dst, abi.SRC: src, abi.RESIDUAL: residual, abi.RING: slot}
    for rows in tables.values():
        assert (rows[:, abi.COUNT] <= chunk).all()
        assert (rows[:, abi.RING_STRIDE] == 4000).all()
        steps = {base: abi.SRC_STEP if base == abi.SRC else abi.DST_STEP for base in sides}
        parts = [addresses_of(rows, base, steps[base], spec) for base, spec in sides.items()]
        found.update(zip(*parts, strict=True))
    assert found == Counter(zip(*map(elements, sides.values()), strict=True))


EXTENTS = st.one_of(st.integers(0, 5), st.integers(2**16 - 3, 2**16), st.integers(2**33, 2**34))


@given(
    st.lists(st.tuples(st.integers(0, 5), EXTENTS, EXTENTS), max_size=4),
    st.permutations(range(4)),
    st.permutations(range(4)),
    st.lists(st.sampled_from([1, 2, 3, -1]), min_size=4, max_size=4),
    st.sampled_from([3, 16, 50, CHUNK]),
)
@example([(4, 2**32 - 2, 0)], [0, 1, 2, 3], [0, 1, 2, 3], [1] * 4, CHUNK)
@example([(3, 0, 0), (4, 2**32 - 2, 0)], [1, 0, 2, 3], [0, 1, 2, 3], [1] * 4, CHUNK)
def test_indices_are_row_major_in_the_whole_tensor(
    axes: list[tuple[int, int, int]], to: list[int], of: list[int], spread: list[int], chunk: int
) -> None:
    shape = tuple(n for n, _, _ in axes)
    offset = tuple(before for _, before, _ in axes)
    whole = tuple(sum(parts) for parts in axes)
    assume(math.prod(whole) < 2**62)

    def side(order: list[int], code: str, address: int) -> TensorSpec:
        order = [axis for axis in order if axis < len(shape)]
        strides, step = [0] * len(shape), 1
        for axis in reversed(order):
            strides[axis] = step * spread[axis]
            step *= shape[axis] * abs(spread[axis])
        return TensorSpec(address, shape, tuple(strides), code, "cpu", True, whole, offset)

    pair = Pair("t", side(to, "bf16", 1 << 40), side(of, "f32", 1 << 50), "bf16~")
    strides = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
    # A table has a row per 2**32 indices between the first and the last: a few thousand here.
    assume(sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) < 2**43)
    places = product(*(range(n) for n in shape))
    want = {
        address: sum((i + o) * s for i, o, s in zip(index, offset, strides, strict=True))
        for address, index in zip(elements(pair.dst), places, strict=True)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CHUNK", chunk)
        check_tables([pair], chunk)
        assert indices_by_address(pair) == want
        bare = pair._replace(dst=replace(pair.dst, whole=None, offset=None))
        assert indices_by_address(bare) == want


def average_pairs(count: int, shape: tuple[int, ...], name: str, address: int) -> list[Pair]:
    """Return a pair for each of several averages of one tensor."""
    src = dense_spec(shape, "f32", address)
    places = [dense_spec(shape, "f32", address + (1 + index << 30)) for index in range(count)]
    return [Pair(name, dst, src, average_index=index) for index, dst in enumerate(places)]


@pytest.mark.parametrize("size", [1, SHARED_CHUNK, 3 * SHARED_CHUNK + 5])
def test_rows_that_read_the_same_chunk_are_adjacent(size: int) -> None:
    pairs = average_pairs(3, (size,), "a", 1 << 40) + average_pairs(3, (0,), "none", 1 << 43)
    pairs += average_pairs(3, (2, 7), "b", 1 << 44)
    (rows,) = table.build_tables(pairs, num_averages=3).values()
    assert len(rows) == 3 * (-(-size // SHARED_CHUNK) + 1)
    for first in range(0, len(rows), 3):
        claimed = rows[first : first + 3]
        np.testing.assert_array_equal(claimed[:, abi.AVERAGE], [0, 1, 2])
        for column, count in (
            *((abi.DST, 3), (abi.KEY, 3), (abi.SRC, 1), (abi.COUNT, 1)),
            *((abi.INDEX, 1), (abi.INDEX_STEP, 1)),
        ):
            assert len({*claimed[:, column].tolist()}) == count
    for pair in pairs:
        mine = rows[(rows[:, abi.KEY] == table.tensor_key(pair))]
        assert addresses_of(mine, abi.DST, abi.DST_STEP, pair.dst) == elements(pair.dst)
        assert addresses_of(mine, abi.SRC, abi.SRC_STEP, pair.src) == elements(pair.src)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_dense_tensors_take_one_row_in_any_axis_order(
    order: tuple[int, ...], codes: tuple[str, str]
) -> None:
    shape = (9, 1, 8, 7)
    dst, src = (dense_spec(shape, code, 1 << 20 + 9 * k, order) for k, code in enumerate(codes))
    tables = check_tables([Pair("t", dst, src)])
    assert {layout: len(rows) for layout, rows in tables.items()} == {"flat": 1}
    if order != (0, 1, 2, 3):
        check_tables([Pair("t", dst, dense_spec(shape, codes[1], 1 << 30))])


def test_bytes_to_divide_among_threads_are_those_of_both_sides() -> None:
    sizes = [((3, 5), ("f32", "bf16")), ((7,), ("c64", "c128")), ((0,), ("f32", "f32"))]
    pairs = [
        Pair("t", *(dense_spec(shape, code, 1 << 20) for code in codes)) for shape, codes in sizes
    ]
    assert table.count_bytes(pairs) == 15 * (4 + 2) + 7 * (8 + 16)
