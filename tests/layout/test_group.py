from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema.errors import DTypeError, LayoutError
from fastema.layout.group import (
    OverlapGuard,
    Pair,
    check_pair,
    refuse_overlap,
    refuse_unwritable,
    unique,
)
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


@given(st.lists(VIEWS, min_size=2, max_size=9), st.integers(0, 9))
def test_overlap_among_many_is_refused_exactly_where_it_is(
    specs: list[TensorSpec], count: int
) -> None:
    sides = named("w", specs[:count]), named("r", specs[count:])
    held = {name: elements(one) for side in sides for name, one in side}
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


@pytest.mark.parametrize("code", ["bool", "f32", "c128"])
def test_overlap_between_dtypes_of_other_sizes_is_found_among_many(code: str) -> None:
    columns = [(f"c{i}", spec(4096 + 32 * i, (9,), strides=(320,))) for i in range(40)]
    gap, byte = spec(4100, (2,), strides=(320,), dtype="bool"), spec(4099, (1,), dtype="bool")
    refuse_overlap([*columns, ("gap", gap)])
    for one in (byte, TensorSpec(4096, (1,), (1,), code, "cpu")):
        with pytest.raises(LayoutError, match=r"c0.*one"):
            refuse_overlap([*columns, ("one", one)])


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


def test_overlap_behind_one_that_has_ended_is_found() -> None:
    long, ended, after = spec(4096, (1000,)), spec(4200, (3,)), spec(4400, (3,))
    with pytest.raises(LayoutError, match=r"long .* after .* overlap"):
        refuse_overlap([("after", after)], [("long", long), ("ended", ended)])


def test_a_thousand_tensors_are_checked_at_once() -> None:
    # Columns of one matrix: spans overlap, elements do not.
    columns = [(f"c{i}", spec(4096 + 4 * i, (20,), strides=(40,))) for i in range(40)]
    refuse_overlap(columns)
    with pytest.raises(LayoutError, match="c7"):
        refuse_overlap(columns, [("again", columns[7][1])])


def reach(one: TensorSpec) -> range:
    """Every byte from the first element's to the last's, gaps included."""
    found = elements(one)
    return range(min(found), max(found) + 1) if found else range(0)


def meet(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


SIDE = st.lists(VIEWS, max_size=5)
MOVES = st.lists(st.integers(0, 60).map(lambda step: 3584 + 16 * step), min_size=5, max_size=5)


def named(label: str, specs: list[TensorSpec]) -> list[tuple[str, TensorSpec]]:
    return [(f"{label}{i}", one) for i, one in enumerate(specs)]


def moved(side: list[tuple[str, TensorSpec]], to: list[int]) -> list[tuple[str, TensorSpec]]:
    return [(name, one.at(address)) for (name, one), address in zip(side, to, strict=False)]


def may_overlap(written: list[tuple[str, TensorSpec]], read: list[tuple[str, TensorSpec]]) -> bool:
    return any(meet(reach(one), reach(other)) for _, one in written for _, other in read)


@given(SIDE, SIDE, MOVES, MOVES)
def test_a_guard_notices_spans_that_meet_wherever_they_moved(
    written: list[TensorSpec], read: list[TensorSpec], there: list[int], elsewhere: list[int]
) -> None:
    ours, theirs = named("w", written), named("r", read)
    guard = OverlapGuard(ours, theirs)
    for to_ours, to_theirs in [(None, None), (there, None), (None, there), (there, elsewhere)]:
        now = ours if to_ours is None else moved(ours, to_ours)
        then = theirs if to_theirs is None else moved(theirs, to_theirs)
        given_ = [
            None if to is None else {name: one.address for name, one in side}
            for to, side in ((to_ours, now), (to_theirs, then))
        ]
        assert guard.may_overlap(*given_) == may_overlap(now, then)
    assert guard.may_overlap(None, None) == may_overlap(
        ours, theirs
    )  # nothing is kept from call to call


@given(SIDE, SIDE, MOVES, MOVES)
def test_what_a_guard_lets_pass_the_exact_test_lets_pass(
    written: list[TensorSpec], read: list[TensorSpec], there: list[int], elsewhere: list[int]
) -> None:
    ours, theirs = moved(named("w", written), there), moved(named("r", read), elsewhere)
    addresses = [{name: one.address for name, one in side} for side in (ours, theirs)]
    if not OverlapGuard(named("w", written), named("r", read)).may_overlap(*addresses):
        for one in ours:
            refuse_overlap([one], theirs)


def test_a_guard_sees_what_lies_behind_a_long_tensor() -> None:
    # The one that begins last before what is read is not the one that reaches it.
    guard = OverlapGuard(
        [("long", spec(4096, (100,))), ("short", spec(4200, (2,)))], [("x", spec(64))]
    )
    assert not guard.may_overlap(None, None)
    assert guard.may_overlap(None, {"x": 4400})
    assert guard.may_overlap(None, {"x": 4096 + 400 - 4})
    assert not guard.may_overlap(None, {"x": 4096 + 400})
    assert not guard.may_overlap(None, {"x": 4096 - 12})
    assert guard.may_overlap(None, {"x": 4096 - 8})
    assert not guard.may_overlap({"long": 1 << 20, "short": 1 << 21}, {"x": 4400})
    assert guard.may_overlap({"long": 1 << 20, "short": 1 << 21}, {"x": 1 << 21})


def test_a_guard_has_no_eye_for_gpus_nor_for_what_is_empty() -> None:
    there = [("w", spec(4096, device="cuda:0")), ("e", spec(4096, (0,)))]
    assert not OverlapGuard(there, [("x", spec(4096))]).may_overlap(None, None)
    assert not OverlapGuard([("x", spec(4096))], there).may_overlap(None, {"w": 4096, "e": 4096})
    assert not OverlapGuard([], []).may_overlap({}, {})
    assert not OverlapGuard([], [("x", spec(4096))]).may_overlap({}, {"x": 1})
    both = OverlapGuard([*there, ("f", spec(64))], [*there, ("x", spec(4096))])
    assert not both.may_overlap(None, None)
    assert both.may_overlap(None, {"w": 0, "e": 0, "x": 68})
