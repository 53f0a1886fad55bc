from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema.errors import DTypeError
from fastema.layout.spec import Leaf, Leaves, TensorSpec


def spec(shape: tuple[int, ...], strides: tuple[int, ...], code: str = "f32") -> TensorSpec:
    return TensorSpec(1 << 20, shape, strides, code, "cpu")


def addresses(one: TensorSpec) -> list[int]:
    """The address of every element, in order of the indices."""
    size = one.kind.itemsize
    indices = product(*(range(n) for n in one.shape))
    return [
        one.address + size * sum(i * s for i, s in zip(index, one.strides, strict=True))
        for index in indices
    ]


AXES = st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9)), max_size=4)


@given(AXES, st.sampled_from(["f32", "bf16", "c128", "bool"]))
def test_span_holds_every_element(axes: list[tuple[int, int]], code: str) -> None:
    one = spec(tuple(n for n, _ in axes), tuple(s for _, s in axes), code)
    first, after = one.span()
    found = addresses(one)
    assert one.size == len(found)
    assert one.nbytes == len(found) * one.kind.itemsize
    if not found:
        assert first == after
    else:
        assert (first, after) == (min(found), max(found) + one.kind.itemsize)


@given(AXES)
def test_dense_is_one_stretch_without_gaps(axes: list[tuple[int, int]]) -> None:
    one = spec(tuple(n for n, _ in axes), tuple(s for _, s in axes))
    if not one.size:
        return
    found = sorted(addresses(one))
    stretch = list(range(one.address, one.address + 4 * one.size, 4))
    if one.dense:
        assert found == stretch
    elif all(stride >= 0 for _, stride in axes):
        assert found != stretch


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_every_order_of_axes_is_dense(order: tuple[int, ...]) -> None:
    array = np.empty((3, 1, 5, 2), np.float32).transpose(order)
    assert spec(array.shape, tuple(s // 4 for s in array.strides)).dense


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 4), (5, 1)), ((4,), (2,)), ((4,), (-1,)), ((3, 4), (0, 1)), ((3, 3), (1, 1))],
)
def test_gaps_and_repetitions_are_not_dense(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    assert not spec(shape, strides).dense


def test_single_element_is_dense_whatever_its_strides() -> None:
    assert spec((), ()).dense
    assert spec((1, 1), (7, -3)).dense


def test_owner_is_not_compared() -> None:
    one = TensorSpec(64, (2,), (1,), "f32", "cpu", owner=object())
    other = TensorSpec(64, (2,), (1,), "f32", "cpu", owner=object())
    assert one == other
    assert hash(one) == hash(other)
    for different in (
        TensorSpec(68, (2,), (1,), "f32", "cpu"),
        TensorSpec(64, (3,), (1,), "f32", "cpu"),
        TensorSpec(64, (2,), (2,), "f32", "cpu"),
        TensorSpec(64, (2,), (1,), "i32", "cpu"),
        TensorSpec(64, (2,), (1,), "f32", "cuda:0"),
        TensorSpec(64, (2,), (1,), "f32", "cpu", writable=False),
    ):
        assert one != different


def test_text_says_what_it_is() -> None:
    assert str(spec((3, 4), (4, 1), "bf16")) == "bf16[3, 4] on cpu"


def test_unknown_dtype() -> None:
    with pytest.raises(DTypeError, match="f8"):
        _ = spec((1,), (1,), "f8").kind


def test_names_of_leaves_are_in_order() -> None:
    leaves = Leaves([Leaf("b", spec((1,), (1,))), Leaf("a", spec((1,), (1,)))], lambda owner: owner)
    assert leaves.names == ["b", "a"]
