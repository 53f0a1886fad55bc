"""Pairs must fit, and their memory must not overlap."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema.errors import DTypeError, LayoutError
from fastema.layout.group import OverlapGuard, Pair, check_pair, refuse_overlap
from fastema.layout.spec import TensorSpec

Named = list[tuple[str, TensorSpec]]


def spec(address: int = 4096, shape: tuple[int, ...] = (3,), **other: object) -> TensorSpec:
    strides = tuple(step // 4 for step in np.empty(shape, np.float32).strides)
    settings = {"strides": strides, "dtype": "f32", "device": "cpu", **other}
    return TensorSpec(address, shape, **settings)


@pytest.mark.parametrize(
    ("dst", "src", "error", "message"),
    [
        (spec(), spec(shape=(4,)), LayoutError, r"layer.*\[3\].*\[4\]"),
        (spec(), spec(device="cuda:0"), LayoutError, r"layer.*cpu.*cuda:0"),
        (spec(dtype="c64"), spec(), DTypeError, r"layer.*c64.*f32"),
        (spec(), spec(dtype="i32"), DTypeError, r"layer.*i32.*f32"),
        (spec(dtype="i64"), spec(dtype="i32"), DTypeError, r"layer.*i32.*i64"),
        (spec(dtype="bool"), spec(dtype="u8"), DTypeError, r"layer.*u8.*bool"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_by_name(
    dst: TensorSpec, src: TensorSpec, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_pair(Pair("layer", dst, src))


def byte_addresses(one: TensorSpec) -> set[int]:
    size = one.kind.itemsize
    return {
        one.address + size * sum(i * s for i, s in zip(index, one.strides, strict=True)) + byte
        for index in product(*(range(n) for n in one.shape))
        for byte in range(size)
    }


def with_names(label: str, specs: list[TensorSpec]) -> Named:
    return [(f"{label}{i}", one) for i, one in enumerate(specs)]


def view(start: int, axes: list[tuple[int, int]], code: str) -> TensorSpec:
    shape, strides = tuple(n for n, _ in axes), tuple(s for _, s in axes)
    return TensorSpec(4096 + 16 * start, shape, strides, code, "cpu")


VIEWS = st.builds(
    view,
    st.integers(0, 12),
    st.lists(st.tuples(st.integers(0, 4), st.integers(-6, 6).filter(bool)), max_size=2),
    st.sampled_from(["f32", "f64", "c128"]),
)


@given(st.lists(VIEWS, min_size=2, max_size=9), st.integers(0, 9))
def test_exactly_the_overlapping_tensors_are_refused(specs: list[TensorSpec], count: int) -> None:
    sides = with_names("w", specs[:count]), with_names("r", specs[count:])
    held = {name: byte_addresses(one) for side in sides for name, one in side}
    shared = {
        frozenset((name, other))
        for name, _ in sides[0]
        for other in held
        if name != other and held[name] & held[other]
    }
    if not shared:
        refuse_overlap(*sides)
        return
    with pytest.raises(LayoutError, match="overlap") as caught:
        refuse_overlap(*sides)
    both = frozenset(word for word in str(caught.value).split() if word in held)
    assert both in shared


def test_overlap_with_a_long_tensor_before_others_is_refused() -> None:
    long, ended, after = spec(4096, (1000,)), spec(4200, (3,)), spec(4400, (3,))
    with pytest.raises(LayoutError, match=r"long .* after .* overlap"):
        refuse_overlap([("after", after)], [("long", long), ("ended", ended)])


def spans_meet(written: Named, read: Named) -> bool:
    """Return whether any spans meet, gaps included."""

    def reach(one: TensorSpec) -> range:
        found = byte_addresses(one)
        return range(min(found), max(found) + 1) if found else range(0)

    def meet(one: range, other: range) -> bool:
        return max(one.start, other.start) < min(one.stop, other.stop)

    return any(meet(reach(one), reach(other)) for _, one in written for _, other in read)


SIDE = st.lists(VIEWS, max_size=5)
MOVES = st.lists(st.integers(0, 60).map(lambda step: 3584 + 16 * step), min_size=5, max_size=5)


@given(SIDE, SIDE, MOVES, MOVES)
def test_a_guard_notices_spans_that_meet_after_any_move(
    written: list[TensorSpec], read: list[TensorSpec], there: list[int], elsewhere: list[int]
) -> None:
    def move_side(side: Named, to: list[int] | None) -> Named:
        places = [one.address for _, one in side] if to is None else to
        return [(name, one.at(at)) for (name, one), at in zip(side, places, strict=False)]

    ours, theirs = with_names("w", written), with_names("r", read)
    guard = OverlapGuard(ours, theirs)
    # The last entry checks that nothing is kept from call to call.
    for moves in ((None, None), (there, None), (None, there), (there, elsewhere), (None, None)):
        now = [move_side(side, to) for side, to in zip((ours, theirs), moves, strict=True)]
        addresses = [
            None if to is None else {name: one.address for name, one in side}
            for side, to in zip(now, moves, strict=True)
        ]
        assert guard.may_overlap(*addresses) == spans_meet(*now)
        if not guard.may_overlap(*addresses):  # then the exact test passes too
            for one in now[0]:
                refuse_overlap([one], now[1])
