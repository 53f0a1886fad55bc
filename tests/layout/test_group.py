from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema.errors import DTypeError, LayoutError
from fastema.layout.group import Pair, check_pair, refuse_overlap, refuse_unwritable, unique
from fastema.layout.spec import TensorSpec


def spec(address: int = 4096, shape: tuple[int, ...] = (3,), **other: object) -> TensorSpec:
    strides = tuple(step // 4 for step in np.empty(shape, np.float32).strides)
    settings = {"strides": strides, "dtype": "f32", "device": "cpu", **other}
    return TensorSpec(address, shape, **settings)


REFUSED = {
    "shapes": (spec(), spec(shape=(4,)), LayoutError, r"layer.*\[3\].*\[4\]"),
    "devices": (spec(), spec(device="cuda:0"), LayoutError, r"layer.*cpu.*cuda:0"),
    "complex": (spec(dtype="c64"), spec(), DTypeError, r"layer.*c64.*f32"),
    "integer": (spec(), spec(dtype="i32"), DTypeError, r"layer.*i32.*f32"),
    "integers": (spec(dtype="i64"), spec(dtype="i32"), DTypeError, r"layer.*i32.*i64"),
    "bool": (spec(dtype="bool"), spec(dtype="u8"), DTypeError, r"layer.*u8.*bool"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pairs_that_do_not_fit_are_named(case: str) -> None:
    dst, src, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        check_pair(Pair("layer", dst, src))


@pytest.mark.parametrize(
    ("dst", "src"), [("f64", "bf16"), ("f16", "f32"), ("c64", "c128"), ("bool", "bool")]
)
def test_pairs_that_fit(dst: str, src: str) -> None:
    check_pair(Pair("layer", spec(dtype=dst), spec(dtype=src)))


def test_what_cannot_be_written_is_named() -> None:
    with pytest.raises(LayoutError, match=r"layer.*f32\[3\].*read-only"):
        refuse_unwritable("layer", spec(writable=False))
    with pytest.raises(LayoutError, match=r"layer.*f32\[2, 3\].*expanded"):
        refuse_unwritable("layer", spec(shape=(2, 3), strides=(0, 1)))
    refuse_unwritable("layer", spec(shape=(1, 3), strides=(0, 1)))
    refuse_unwritable("layer", spec(shape=(0, 3), strides=(0, 0)))


def test_tied_pairs_are_kept_once() -> None:
    tied = [Pair(name, spec(4096), spec(8192)) for name in ("first", "second")]
    other = Pair("third", spec(4096), spec(12288))
    assert unique([*tied, other]) == [tied[0], other]


def elements(one: TensorSpec) -> set[int]:
    size = one.kind.itemsize
    return {
        one.address + size * sum(i * s for i, s in zip(index, one.strides, strict=True)) + byte
        for index in product(*(range(n) for n in one.shape))
        for byte in range(size)
    }


VIEWS = st.builds(
    lambda start, axes, code: TensorSpec(
        4096 + 16 * start,
        tuple(n for n, _ in axes),
        tuple(s for _, s in axes),
        code,
        "cpu",
    ),
    st.integers(0, 12),
    st.lists(st.tuples(st.integers(0, 4), st.integers(-6, 6).filter(bool)), max_size=2),
    st.sampled_from(["f32", "f64", "c128"]),
)


@given(VIEWS, VIEWS, st.booleans())
def test_overlap_is_refused_exactly_where_it_is(
    one: TensorSpec, other: TensorSpec, other_written: bool
) -> None:
    overlap = bool(elements(one) & elements(other))
    sides = (
        ([("one", one), ("other", other)], [])
        if other_written
        else ([("one", one)], [("other", other)])
    )
    if overlap:
        with pytest.raises(LayoutError, match="overlap") as caught:
            refuse_overlap(*sides)
        assert "one" in str(caught.value)
        assert "other" in str(caught.value)
    else:
        refuse_overlap(*sides)


def test_reading_twice_is_no_overlap() -> None:
    refuse_overlap([("avg", spec(8192))], [("a", spec(4096)), ("b", spec(4096))])


def test_equal_addresses_on_two_devices_are_no_overlap() -> None:
    refuse_overlap([("a", spec(4096)), ("b", spec(4096, device="cuda:0"))])


def test_overlap_behind_a_long_tensor_is_found() -> None:
    # The one that begins next is not the one that is hit.
    long, inside, after = spec(4096, (100,)), spec(5000, (3,)), spec(4400, (3,))
    with pytest.raises(LayoutError, match=r"long.*after"):
        refuse_overlap([("long", long)], [("after", after)])
    with pytest.raises(LayoutError, match="inside"):
        refuse_overlap([("after", after), ("inside", inside)], [("inside too", inside)])


def test_a_thousand_tensors_are_checked_at_once() -> None:
    # Columns of one matrix: spans overlap, elements do not.
    columns = [(f"c{i}", spec(4096 + 4 * i, (20,), strides=(40,))) for i in range(40)]
    refuse_overlap(columns)
    with pytest.raises(LayoutError, match="c7"):
        refuse_overlap(columns, [("again", columns[7][1])])
