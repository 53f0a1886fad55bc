"""Whole runs through layout, threads and kernels: every dtype, every way to lie in memory."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastema.engine import registry
from fastema.engine.program import Program
from fastema.errors import DTypeError
from fastema.kernels.table import CHUNK
from fastema.layout.device_context import LaunchArgs
from fastema.layout.dtypes import DTYPES
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

from ..support import reference

REAL = [code for code, kind in DTYPES.items() if kind.real and kind.parts == 1]
COMPLEX = [code for code, kind in DTYPES.items() if kind.parts == 2]
EXACT = [code for code, kind in DTYPES.items() if kind.whole]
PAIRS = [*product(REAL, REAL), *product(COMPLEX, COMPLEX)]
PAIR_IDS = ["-".join(pair) for pair in PAIRS]
SIZES = [0, 1, 65, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
W = 0.125

pytestmark = pytest.mark.usefixtures("eager")

Check = Callable[..., None]
Make = Callable[..., np.ndarray]


def expected(
    operation: str, a: np.ndarray, b: np.ndarray, dst: str, src: str
) -> tuple[np.ndarray, np.ndarray]:
    """What both sides hold afterwards."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    if operation == "lerp":
        return reference.lerp(a.reshape(-1), b.reshape(-1), W, dst, src).reshape(a.shape), b
    if operation == "copy":
        return reference.cast(b.reshape(-1), src, dst).reshape(a.shape), b
    new_a, new_b = reference.swap(a.reshape(-1), b.reshape(-1), dst, src)
    return new_a.reshape(a.shape), new_b.reshape(a.shape)


@pytest.mark.parametrize("operation", ["lerp", "copy", "swap"])
@pytest.mark.parametrize(("dst", "src"), PAIRS, ids=PAIR_IDS)
def test_every_pair_of_floats(
    dst: str,
    src: str,
    operation: str,
    numbers: Make,
    guarded: Callable[..., object],
    assert_same: Check,
    run_pairs: Callable[..., Program],
    threads: Callable[[int], None],
) -> None:
    threads(2)
    sizes = SIZES if dst in ("f32", "bf16", "c64") else [0, 1, 65, CHUNK + 1]
    sides = [
        (guarded(numbers(n, dst, i), start=i % 3), guarded(numbers(n, src, 50 + i), start=8))
        for i, n in enumerate(sizes)
    ]
    want = [expected(operation, to.array, of.array, dst, src) for to, of in sides]
    run_pairs(operation, [(to.array, of.array) for to, of in sides], dst, src, W)
    for (to, of), (new, other) in zip(sides, want, strict=True):
        assert_same(to.array, new, dst)
        assert_same(of.array, other, src)
        to.assert_rest_untouched()
        of.assert_rest_untouched()


@pytest.mark.parametrize("code", [*EXACT, *REAL, *COMPLEX])
def test_equal_dtypes_are_moved_to_the_bit(
    code: str, numbers: Make, bits: Make, run_pairs: Callable[..., Program]
) -> None:
    a, b = numbers(700, code, 1, "bits"), numbers(700, code, 2, "bits")
    old = a.copy()
    run_pairs("swap", [(a, b)], code, code)
    np.testing.assert_array_equal(bits(b), bits(old))
    b[:] = numbers(700, code, 3, "bits")
    run_pairs("copy", [(a, b)], code, code)
    np.testing.assert_array_equal(bits(a), bits(b))


# shape, then strides of both sides in elements.
LAYOUTS = {
    "row-major": ((6, 5, 8), (40, 8, 1), (40, 8, 1)),
    "transposed": ((6, 80), (1, 6), (1, 6)),
    "channels last": ((4, 6, 5, 7), (210, 1, 42, 6), (210, 1, 42, 6)),
    "permuted": ((6, 5, 8), (1, 48, 6), (1, 48, 6)),
    "differently permuted": ((6, 5, 8), (40, 8, 1), (1, 48, 6)),
    "0-dim": ((), (), ()),
    "ones": ((1, 1, 1), (1, 1, 1), (9, 4, 7)),
    "every second": ((70,), (2,), (2,)),
    "rows of a matrix": ((7, 30), (90, 1), (60, 1)),
    "few columns": ((70, 3), (9, 1), (3, 1)),
    "gaps on one side": ((7, 30), (30, 1), (64, 1)),
    "backwards": ((65,), (-1,), (1,)),
    "backwards on both": ((9, 31), (-40, -1), (-35, -1)),
    "backwards rows": ((9, 70), (70, 1), (-70, 1)),
    "expanded source": ((9, 70), (70, 1), (0, 1)),
    "one source element": ((9, 70), (70, 1), (0, 0)),
    "long and strided": ((CHUNK + 3,), (2,), (1,)),
}


# An expanded tensor is not written, integers are not averaged.
CASES = [
    pytest.param(dst, src, operation, layout, id=f"{dst}-{src}-{operation}-{layout}")
    for dst, src in (("f32", "bf16"), ("c64", "c64"), ("i16", "i16"))
    for operation in ("lerp", "copy", "swap")
    for layout in LAYOUTS
    if not (operation == "swap" and "source" in layout)
    if not (operation == "lerp" and dst == "i16")
]


@pytest.mark.parametrize(("dst", "src", "operation", "layout"), CASES)
def test_every_way_to_lie_in_memory(
    dst: str,
    src: str,
    operation: str,
    layout: str,
    numbers: Make,
    guarded: Callable[..., object],
    assert_same: Check,
    run_pairs: Callable[..., Program],
) -> None:
    shape, *strides = LAYOUTS[layout]
    size = int(np.prod(shape))
    to = guarded(numbers(size, dst, 1).reshape(shape), 1, strides[0])
    of = guarded(numbers(size, src, 2).reshape(shape), 2, strides[1])
    new, other = expected(operation, to.array, of.array, dst, src)
    run_pairs(operation, [(to.array, of.array)], dst, src, W)
    assert_same(np.ascontiguousarray(to.array), new, dst)
    assert_same(np.ascontiguousarray(of.array), other, src)
    to.assert_rest_untouched()
    of.assert_rest_untouched()


@pytest.mark.parametrize(("dst", "src"), [("f32", "bf16"), ("bf16", "bf16"), ("f64", "f32")])
def test_threads_layout_and_grouping_do_not_change_a_bit(
    dst: str,
    src: str,
    numbers: Make,
    bits: Make,
    run_pairs: Callable[..., Program],
    threads: Callable[[int], None],
) -> None:
    avg, x = numbers(5 * CHUNK + 11, dst, 1), numbers(5 * CHUNK + 11, src, 2)

    def result(count: int, cuts: list[int], step: int = 1, order: int = 1) -> np.ndarray:
        threads(count)
        spaced = np.empty(len(avg) * step, avg.dtype)[::step]
        spaced[:] = avg
        sides = list(zip(np.split(spaced, cuts), np.split(x, cuts), strict=True))[::order]
        run_pairs("lerp", sides, dst, src, 0.3)
        return bits(spaced)

    want = result(1, [])
    np.testing.assert_array_equal(result(2, []), want)
    np.testing.assert_array_equal(result(3, [1, 2, 66, CHUNK + 7]), want)
    np.testing.assert_array_equal(result(2, [1, 2, 66, CHUNK + 7], order=-1), want)
    np.testing.assert_array_equal(result(2, [77], step=2), want)


@pytest.mark.parametrize(("dst", "src"), [("bf16", "bf16"), ("bf16", "f32"), ("f16", "f64")])
def test_random_bits_belong_to_elements_not_to_chunks_threads_or_places(
    dst: str,
    src: str,
    numbers: Make,
    bits: Make,
    spec_of: Callable[..., TensorSpec],
    threads: Callable[[int], None],
) -> None:
    size = 3 * CHUNK + 11
    avg, x = numbers(size, dst, 1), numbers(size, src, 2)
    other = numbers(500, dst, 3), numbers(500, src, 4)

    def result(
        count: int, space: int = 1, among: bool = False, seed: int = 5, step: int = 9
    ) -> np.ndarray:
        threads(count)
        spaced = np.empty(size * abs(space), avg.dtype)[::space]
        spaced[:] = avg
        pairs = [Pair("t", spec_of(spaced, dst), spec_of(x, src), f"{dst}~")]
        if among:
            first = Pair("a", spec_of(other[0].copy(), dst), spec_of(other[1], src), f"{dst}~")
            pairs.insert(0, first)
        program = Program({"all": pairs})
        program.run({"all": "lerp"}, LaunchArgs((0.3,), seed, step))
        return bits(spaced)

    want = result(1)
    for got in (result(2), result(3, among=True), result(2, space=2), result(1, space=-1)):
        np.testing.assert_array_equal(got, want)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastema.layout.table.CHUNK", 1000)
        np.testing.assert_array_equal(result(2), want)
    exact = bits(reference.lerp(avg, x, 0.3, dst, src))
    unlike = [np.mean(want != bits_) for bits_ in (exact, result(1, seed=6), result(1, step=10))]
    assert all(0.2 < share < 0.8 for share in unlike)


@pytest.mark.parametrize(("dst", "src"), [("f32", "f32"), ("f32", "bf16"), ("c64", "c64")])
@pytest.mark.parametrize("count", [1, 3])
def test_averages_updated_together_are_those_updated_apart(
    dst: str,
    src: str,
    count: int,
    numbers: Make,
    guarded: Callable[..., object],
    assert_same: Check,
    spec_of: Callable[..., TensorSpec],
    threads: Callable[[int], None],
) -> None:
    """Tensors of many sizes and layouts, three averages of each."""
    threads(count)
    weights = (0.5, 0.125, 1.0)
    sizes = [(0,), (1,), (65,), (CHUNK + 1,), (7, 30), (3, 5)]
    strides = [None, None, None, None, (90, 1), (1, 3)]
    pairs, sides = [], []
    for i, (shape, steps) in enumerate(zip(sizes, strides, strict=True)):
        x = guarded(numbers(int(np.prod(shape)), src, i).reshape(shape), i % 3)
        for index in range(3):
            values = numbers(int(np.prod(shape)), dst, 10 * i + index).reshape(shape)
            to = guarded(values, index, steps)
            pair = Pair(f"t{i}", spec_of(to.array, dst), spec_of(x.array, src), average_index=index)
            pairs.append(pair)
            want = reference.lerp(values.reshape(-1), x.array.reshape(-1), weights[index], dst, src)
            sides.append((to, x, want))
    program = Program({"all": pairs})
    program.run({"all": "lerp"}, LaunchArgs(weights))
    for to, x, want in sides:
        assert_same(np.ascontiguousarray(to.array).reshape(-1), want, dst)
        to.assert_rest_untouched()
        x.assert_untouched()


@pytest.mark.parametrize("dst", ["f32", "f64", "bf16"])
def test_measures_are_those_of_each_average(
    dst: str, numbers: Make, spec_of: Callable[..., TensorSpec], threads: Callable[[int], None]
) -> None:
    threads(3)
    sizes = [5, 1000, 3 * CHUNK + 5]
    weights = (0.25, 0.0)
    pairs, found = [], [[0.0, 0.0, 0.0] for _ in weights]
    for i, size in enumerate(sizes):
        x = numbers(size, "f32", i)
        for index, weight in enumerate(weights):
            avg = numbers(size, dst, 50 + i)
            after = reference.decode(reference.lerp(avg, x, weight, dst, "f32"), dst)
            found[index][0] += np.sum((x - after) ** 2)
            found[index][1] += np.sum(after**2)
            found[index][2] += np.sum(after == reference.decode(avg, dst))
            pairs.append(Pair(f"t{i}", spec_of(avg, dst), spec_of(x, "f32"), average_index=index))
    program = Program({"all": pairs})
    program.run({"all": "lerp_measured"}, LaunchArgs(weights))
    for index, (distance, square, still) in enumerate(found):
        measured = program.measured(index)
        np.testing.assert_allclose(measured[:2], np.sqrt([distance, square]), rtol=1e-4)
        assert measured.still == still
    assert program.measured(1).still == sum(sizes)


def test_what_is_not_finite_is_found_wherever_it_is(
    numbers: Make, spec_of: Callable[..., TensorSpec], threads: Callable[[int], None]
) -> None:
    threads(2)
    avg, x = numbers(3 * CHUNK, "f32", 1), numbers(3 * CHUNK, "bf16", 2)
    other = numbers(9, "f64", 3), numbers(9, "f64", 4)
    program = Program(
        {
            "all": [
                Pair("t", spec_of(avg, "f32"), spec_of(x, "bf16")),
                Pair("u", spec_of(other[0], "f64"), spec_of(other[1], "f64")),
            ]
        }
    )

    def finite() -> bool:
        program.run({"all": "finite"})
        return program.all_finite()

    before = avg.copy()
    assert finite()
    for place in (0, 63, CHUNK, 3 * CHUNK - 1):
        for pattern in (0x7F80, 0xFF80, 0x7FC0, 0x7F81):
            kept, x[place] = x[place], pattern
            assert not finite(), (place, pattern)
            x[place] = kept
            assert finite()
    other[1][8] = np.nan
    assert not finite()
    np.testing.assert_array_equal(avg, before)


FINITE = st.floats(-(2.0**50), 2.0**50, width=32)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=130),
    st.floats(0, 1, width=32),
    st.sampled_from(REAL),
    st.sampled_from(REAL),
)
def test_properties_of_an_update(
    run_pairs: Callable[..., Program],
    bits: Make,
    values: list[tuple[float, float]],
    w: float,
    dst: str,
    src: str,
) -> None:
    wide = np.array(values, np.float64)
    avg, x = reference.encode(wide[:, 0], dst), reference.encode(wide[:, 1], src)

    def lerp(a: np.ndarray, b: np.ndarray, weight: float, code: str = src) -> np.ndarray:
        out = a.copy()
        run_pairs("lerp", [(out, b)], dst, code, weight)
        return out

    # A weight of 1 copies, 0 keeps (but for the sign of a zero), equals stay.
    np.testing.assert_array_equal(bits(lerp(avg, x, 1.0)), bits(reference.cast(x, src, dst)))
    finite = np.isfinite(reference.decode(avg, dst)) & np.isfinite(reference.decode(x, src))
    avg, x = avg[finite], x[finite]
    kept = reference.decode(avg, dst)
    np.testing.assert_array_equal(reference.decode(lerp(avg, x, 0.0), dst), kept)
    np.testing.assert_array_equal(reference.decode(lerp(avg, avg, w, dst), dst), kept)
    # The order of the elements is of no account.
    np.testing.assert_array_equal(
        bits(lerp(avg[::-1].copy(), x[::-1].copy(), w))[::-1], bits(lerp(avg, x, w))
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(*[st.one_of(st.just(0.0), st.floats(2.0**-10, 2.0**10, width=32))] * 2),
        min_size=1,
        max_size=80,
    ),
    st.floats(2.0**-20, 1, width=32),
    st.sampled_from(["f64", "f32", "bf16"]),
    st.sampled_from(REAL),
    st.sampled_from([2.0, -1.0, -0.5]),
)
def test_an_update_is_linear(
    run_pairs: Callable[..., Program],
    values: list[tuple[float, float]],
    w: float,
    dst: str,
    src: str,
    scale: float,
) -> None:
    wide = np.array(values, np.float64)

    def update(factor: float) -> np.ndarray:
        avg = reference.encode(factor * wide[:, 0], dst)
        x = reference.encode(factor * wide[:, 1], src)
        run_pairs("lerp", [(avg, x)], dst, src, w)
        return reference.decode(avg, dst)

    # Rounding does not see powers of two, nor signs.
    np.testing.assert_array_equal(update(scale), scale * update(1.0))


def test_only_the_tags_of_a_run_are_touched(
    numbers: Make, spec_of: Callable[..., TensorSpec]
) -> None:
    sides = {tag: (numbers(90, "f32", i), numbers(90, "f32", 9 + i)) for i, tag in enumerate("abc")}
    program = Program(
        {tag: [Pair(tag, spec_of(a, "f32"), spec_of(x, "f32"))] for tag, (a, x) in sides.items()}
    )
    before = {tag: (a.copy(), x.copy()) for tag, (a, x) in sides.items()}
    program.run({"a": "lerp", "c": "swap"}, LaunchArgs((1.0,)))
    np.testing.assert_array_equal(sides["a"], [before["a"][1], before["a"][1]])
    np.testing.assert_array_equal(sides["b"], before["b"])
    np.testing.assert_array_equal(sides["c"], before["c"][::-1])


def test_integers_are_not_averaged(numbers: Make, spec_of: Callable[..., TensorSpec]) -> None:
    floats, whole = numbers(9, "f32", 1), numbers(9, "i32", 2)
    pairs = [
        Pair("f", spec_of(floats, "f32"), spec_of(floats + 1, "f32")),
        Pair("i", spec_of(whole, "i32"), spec_of(whole + 1, "i32")),
    ]
    before = floats.copy()
    program = Program({"all": pairs})
    with pytest.raises(DTypeError, match="i32"):
        program.run({"all": "lerp"}, LaunchArgs((0.5,)))
    np.testing.assert_array_equal(floats, before)


def test_devices_without_kernels_are_refused() -> None:
    spec = TensorSpec(64, (3,), (1,), "f32", "tpu:0")
    with pytest.raises(DTypeError, match=r"layer.*tpu:0"):
        Program({"all": [Pair("layer", spec, spec)]})


def test_nothing_to_do() -> None:
    Program({"all": []}).run({"all": "lerp"}, LaunchArgs((0.5,)))


POISON = {"f32": np.float32(np.nan), "f16": np.float16(np.nan), "bf16": np.uint16(0x7FC0)}

RELOCATED = {
    "flat": ((3 * CHUNK + 5,), (1,), (1,)),
    "strided": ((7, 30), (90, 1), (1, 7)),
    "backwards": ((65,), (-1,), (2,)),
    "one": ((), (), ()),
    "none": ((0, 3), (3, 1), (3, 1)),
}


@pytest.mark.parametrize(("dst", "src"), [("f32", "f32"), ("f32", "bf16"), ("f16", "f32")])
@pytest.mark.parametrize("sides", ["dst", "src", "both"])
def test_tensors_that_moved_are_worked_on_where_they_are(
    dst: str,
    src: str,
    sides: str,
    numbers: Make,
    guarded: Callable[..., object],
    assert_same: Check,
    spec_of: Callable[..., TensorSpec],
    threads: Callable[[int], None],
) -> None:
    threads(2)

    def put(values: np.ndarray, side: int, layout: str, move: int) -> object:
        return guarded(values, start=move % 5, strides=RELOCATED[layout][1 + side])

    def fresh(side: int, code: str, seed: int) -> dict[str, object]:
        return {
            name: put(numbers(int(np.prod(shape)), code, seed + i).reshape(shape), side, name, seed)
            for i, (name, (shape, *_)) in enumerate(RELOCATED.items())
        }

    avg, x = fresh(0, dst, 1), fresh(1, src, 100)
    pairs = [Pair(n, spec_of(avg[n].array, dst), spec_of(x[n].array, src)) for n in RELOCATED]
    program = Program({"one": pairs[::2], "other": pairs[1::2]})
    operations = {"one": "lerp", "other": "lerp"}
    for move in range(1, 5):
        want = {n: expected("lerp", avg[n].array, x[n].array, dst, src)[0] for n in RELOCATED}
        program.run(operations, LaunchArgs((W,)))
        for n in RELOCATED:
            assert_same(np.ascontiguousarray(avg[n].array), want[n], dst)
            avg[n].assert_rest_untouched()
            x[n].assert_untouched()
        left = {}
        if sides != "src":  # the values go along, and the memory that they had must not be touched
            left["dst"] = avg
            avg = {n: put(one.array.copy(), 0, n, 10 * move) for n, one in avg.items()}
        if sides != "dst":
            left["src"], x = x, fresh(1, src, 100 * (move + 1))
        for side, old in left.items():
            for one in old.values():
                one.array[...] = POISON[dst if side == "dst" else src]
                one._before[...] = one._poison
        now = {"dst": avg, "src": x}
        program.relocate(**{s: {n: now[s][n].array.ctypes.data for n in RELOCATED} for s in left})
        program.run({}, LaunchArgs((W,)))
        for old in left.values():
            for one in old.values():
                one.assert_untouched()


def test_averages_updated_together_are_found_in_other_places(
    numbers: Make, spec_of: Callable[..., TensorSpec], assert_same: Check
) -> None:
    weights = (0.5, 0.25, 1.0)
    avg = [[numbers(n, "f32", 10 * i + w) for w in range(3)] for i, n in enumerate((5, CHUNK + 9))]
    x = [numbers(len(one[0]), "f32", 90 + i) for i, one in enumerate(avg)]
    pairs = [
        Pair(f"t{i}", spec_of(a, "f32"), spec_of(x[i], "f32"), average_index=w)
        for i, several in enumerate(avg)
        for w, a in enumerate(several)
    ]
    program = Program({"all": pairs})
    later = [numbers(len(one), "f32", 70 + i) for i, one in enumerate(x)]
    want = [
        reference.lerp(a, later[i], weights[w], "f32", "f32")
        for i, several in enumerate(avg)
        for w, a in enumerate(several)
    ]
    for one in x:
        one[...] = np.nan
    program.relocate(src={f"t{i}": one.ctypes.data for i, one in enumerate(later)})
    program.run({"all": "lerp"}, LaunchArgs(weights))
    for got, wanted in zip([a for several in avg for a in several], want, strict=True):
        assert_same(got, wanted, "f32")


def test_a_move_is_not_added_to_the_last_one(
    numbers: Make, spec_of: Callable[..., TensorSpec]
) -> None:
    whole = np.full(3000, np.nan, np.float32)
    avg, x = numbers(1000, "f32", 1), whole[:1000]
    x[...] = numbers(1000, "f32", 2)
    program = Program({"all": [Pair("t", spec_of(avg, "f32"), spec_of(x, "f32"))]})
    for start in (500, 1999, 0, 2000, 2000, 1):
        values = numbers(1000, "f32", start)
        whole[:] = np.nan
        whole[start : start + 1000] = values
        program.relocate(src={"t": whole[start:].ctypes.data})
        program.run({"all": "copy"})
        np.testing.assert_array_equal(avg, values)


@pytest.mark.slow
def test_later_runs_compile_nothing_and_keep_no_memory(
    numbers: Make,
    run_pairs: Callable[..., Program],
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads(2)
    sides = [(numbers(n, "f32", n), numbers(n, "f32", n + 1)) for n in (5, 1000, 3 * CHUNK)]
    program = run_pairs("lerp", sides, "f32", "f32", W)
    made = dict(registry._made)
    monkeypatch.setattr("fastema.engine.cpu_group.kernel", None)  # asked for once only
    monkeypatch.setattr("fastema.engine.cpu_group.numbered_tables", None)
    for _ in range(20):
        program.run({"all": "lerp"}, LaunchArgs((W,)))
    assert registry._made == made
    tracemalloc.start()
    try:
        held = []
        for _ in range(4):
            for _ in range(2500):  # more than the interpreter keeps of freed tuples and the like
                program.run({"all": "lerp"}, LaunchArgs((W,)))
            time.sleep(0.3)  # helpers that came too late still clear their queue
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # What a run keeps, every round keeps; what else grows and shrinks, the least of them does not.
    assert min(np.diff(held)) < 2500
