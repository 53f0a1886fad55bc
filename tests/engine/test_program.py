"""Whole runs through layout, threads and kernels: every dtype and every memory layout."""

import gc
import time
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import permutations, product

import numpy as np
import pytest

from fastema.engine import registry
from fastema.engine.program import Program
from fastema.kernels.table import CHUNK, SHARED_CHUNK
from fastema.layout.device_context import LaunchArgs
from fastema.layout.dtypes import DTYPES
from fastema.layout.group import Pair

from ..support import reference
from ..support.arrays import GuardedArray, assert_same, lay_out_guarded, numbers, spec_of

REAL = [code for code, kind in DTYPES.items() if kind.real and kind.parts == 1]
COMPLEX = [code for code, kind in DTYPES.items() if kind.parts == 2]
PAIRS = [*product(REAL, REAL), *product(COMPLEX, COMPLEX)]
SIZES = [0, 1, 65, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
W = 0.125

pytestmark = pytest.mark.usefixtures("eager")

Array = np.ndarray
Threads = Callable[[int], None]


def run(operation: str, sides: Sequence[tuple[Array, Array]], dst: str, src: str) -> Program:
    """Run pairs of arrays through the engine."""
    pairs = [Pair(f"t{i}", spec_of(a, dst), spec_of(b, src)) for i, (a, b) in enumerate(sides)]
    program = Program({"all": pairs})
    program.run({"all": operation}, LaunchArgs((W,)))
    return program


def expected(operation: str, a: Array, b: Array, dst: str, src: str) -> tuple[Array, Array]:
    """Return what both sides hold afterwards."""
    shape, a, b = a.shape, a.reshape(-1), b.reshape(-1)
    if operation == "lerp":
        after = reference.lerp(a, b, W, dst, src), b
    elif operation == "copy":
        after = reference.cast(b, src, dst), b
    else:
        after = reference.swap(a, b, dst, src)
    return after[0].reshape(shape), after[1].reshape(shape)


@pytest.mark.parametrize("operation", ["lerp", "copy", "swap"])
@pytest.mark.parametrize(("dst", "src"), PAIRS)
def test_every_pair_of_floats_matches_the_specification(
    dst: str, src: str, operation: str, threads: Threads
) -> None:
    threads(2)
    sizes = SIZES if dst in ("f32", "bf16", "c64") else [0, 1, 65, CHUNK + 1]
    sides = [
        (
            lay_out_guarded(numbers(n, dst, i), start=i % 3),
            lay_out_guarded(numbers(n, src, 50 + i), start=8),
        )
        for i, n in enumerate(sizes)
    ]
    want = [expected(operation, to.array, of.array, dst, src) for to, of in sides]
    run(operation, [(to.array, of.array) for to, of in sides], dst, src)
    for (to, of), (new, other) in zip(sides, want, strict=True):
        assert_same(to.array, new, dst)
        assert_same(of.array, other, src)
        to.assert_rest_untouched()
        of.assert_rest_untouched()


SHAPE = (24, 10, 35)
SEED, STEP = 2**40 + 3, 2**33 + 7
WHOLES = {
    "the part itself": (SHAPE, (0, 0, 0)),
    "small": ((40, 19, 60), (3, 2, 5)),
    "large": ((2**20, 2**10, 2**10), (2**19, 7, 0)),
    "over a multiple of 2**32": ((1000, 5000, 1001), (845, 673, 600)),
    "axes beyond 2**32": ((25, 11, 2**33), (1, 1, 2**32 - 17)),
}


def copy_in_order(array: Array, order: tuple[int, ...]) -> Array:
    """Return a copy whose axes are stored in this order."""
    return array.transpose(order).copy().transpose(np.argsort(order))


def round_at_random(avg: Array, x: Array, dst: str, src: str, **part: object) -> None:
    pair = Pair("t", spec_of(avg, dst), spec_of(x, src, **part), f"{dst}~")
    Program({"all": [pair]}).run({"all": "lerp"}, LaunchArgs((0.3,), SEED, STEP))


def expected_rounding(avg: Array, x: Array, dst: str, src: str, index: Array) -> Array:
    words = reference.random_words(SEED, STEP, reference.tensor_key("t"), index)
    return reference.lerp(avg, x, 0.3, dst, src, words)


def random_sides(dst: str, src: str) -> tuple[Array, Array]:
    size = int(np.prod(SHAPE))
    return numbers(size, dst, 0).reshape(SHAPE), numbers(size, src, 1).reshape(SHAPE)


@pytest.mark.parametrize(("dst", "src"), [("bf16", "bf16"), ("f16", "f32")])
@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("name", WHOLES)
def test_random_bits_depend_on_indices_in_the_whole_tensor(
    name: str, order: tuple[int, ...], dst: str, src: str
) -> None:
    avg, x = random_sides(dst, src)
    whole, offset = WHOLES[name]
    axes = np.meshgrid(
        *(np.arange(n) + o for n, o in zip(SHAPE, offset, strict=True)), indexing="ij"
    )
    index = (axes[0] * whole[1] + axes[1]) * whole[2] + axes[2]
    assert (len(np.unique(index >> 32)) > 1) == ("2**32" in name)
    want = expected_rounding(avg, x, dst, src, index)
    for other in {order, (0, 1, 2)}:
        got = copy_in_order(avg, order)
        round_at_random(got, copy_in_order(x, other), dst, src, whole=whole, offset=offset)
        np.testing.assert_array_equal(got, want)


WEIGHTS = (0.3, 0.01, 0.0009765625, 1.0)
SHAPES = [(0,), (1,), (65,), (SHARED_CHUNK - 1,), (2 * SHARED_CHUNK + 77,), (70, 40), (3, 5)]
SPREAD = {(70, 40): (1, 70), (3, 5): (9, 1)}
"""Strides of averages whose axes are not in the order of the weights', or that have gaps."""


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("dst", "src", "form"),
    [
        *(("f32", "f32", ""), ("f32", "bf16", ""), ("bf16", "bf16", "bf16~"), ("f64", "f32", "")),
        ("c64", "c64", ""),
    ],
)
def test_several_averages_equal_one_run_each(
    dst: str, src: str, form: str, workers: int, count: int, threads: Threads
) -> None:
    threads(workers)
    pairs, sides = [], []
    for i, shape in enumerate(SHAPES):
        size = int(np.prod(shape))
        x = lay_out_guarded(numbers(size, src, i).reshape(shape), i % 3)
        for k in range(count):
            start = numbers(size, dst, 10 * i + k).reshape(shape)
            to = lay_out_guarded(start, k, SPREAD.get(shape))
            ours, theirs = spec_of(to.array, dst), spec_of(x.array, src)
            pairs.append(Pair(f"t{i}", ours, theirs, form, average_index=k))
            key = reference.tensor_key(f"t{i}", k)
            words = reference.random_words(5, 6, key, np.arange(size)) if form else None
            flat = start.reshape(-1), x.array.reshape(-1)
            want = reference.lerp(*flat, WEIGHTS[k], dst, src, words).reshape(shape)
            sides.append((to, x, want))
    Program({"all": pairs}).run({"all": "lerp"}, LaunchArgs(WEIGHTS[:count], 5, 6))
    for to, x, want in sides:
        assert_same(to.array, want, dst)
        to.assert_rest_untouched()
        x.assert_untouched()


POISON = {"f32": np.float32(np.nan), "f16": np.float16(np.nan), "bf16": np.uint16(0x7FC0)}
RELOCATED = {  # shape, then strides of both sides in elements
    "flat": ((3 * CHUNK + 5,), (1,), (1,)),
    "strided": ((7, 30), (90, 1), (1, 7)),
    "backwards": ((65,), (-1,), (2,)),
    "one": ((), (), ()),
    "none": ((0, 3), (3, 1), (3, 1)),
}


@pytest.mark.parametrize(
    ("dst", "src", "count"), [("f32", "f32", 3), ("f32", "bf16", 1), ("f16", "f32", 1)]
)
@pytest.mark.parametrize("sides", ["dst", "src", "both"])
def test_moved_tensors_are_used_at_their_new_addresses(
    dst: str, src: str, count: int, sides: str, threads: Threads
) -> None:
    """They move repeatedly, and their former memory is not touched."""
    threads(2)
    if sides != "src":
        count = 1  # averages of one tensor share its name

    def put(values: Array, name: str, side: int, move: int) -> GuardedArray:
        return lay_out_guarded(values, start=move % 5, strides=RELOCATED[name][1 + side])

    def fresh(side: int, code: str, seed: int) -> dict[str, GuardedArray]:
        return {
            name: put(numbers(int(np.prod(shape)), code, seed + i).reshape(shape), name, side, seed)
            for i, (name, (shape, *_)) in enumerate(RELOCATED.items())
        }

    averages, x = [fresh(0, dst, 1 + 7 * k) for k in range(count)], fresh(1, src, 100)
    pairs = [
        Pair(n, spec_of(avg[n].array, dst), spec_of(x[n].array, src), average_index=k)
        for n in RELOCATED
        for k, avg in enumerate(averages)
    ]
    half = 2 * count
    program = Program({"one": pairs[:half], "other": pairs[half:]})
    for move in range(1, 5):
        want = [
            {n: expected("lerp", avg[n].array, x[n].array, dst, src)[0] for n in RELOCATED}
            for avg in averages
        ]
        program.run({"one": "lerp", "other": "lerp"}, LaunchArgs((W,) * count))
        for avg, after in zip(averages, want, strict=True):
            for n in RELOCATED:
                assert_same(avg[n].array, after[n], dst)
                avg[n].assert_rest_untouched()
                x[n].assert_untouched()
        left: dict[str, dict[str, GuardedArray]] = {}
        if sides != "src":  # averages keep their values
            left["dst"] = averages[0]
            averages[0] = {
                n: put(one.array.copy(), n, 0, 10 * move) for n, one in averages[0].items()
            }
        if sides != "dst":
            left["src"], x = x, fresh(1, src, 100 * (move + 1))
        for side, old in left.items():
            for one in old.values():
                one.poison(POISON[dst if side == "dst" else src])
        now = {"dst": averages[0], "src": x}
        program.relocate(**{s: {n: now[s][n].array.ctypes.data for n in RELOCATED} for s in left})
        program.run({}, LaunchArgs((W,) * count))
        for old in left.values():
            for one in old.values():
                one.assert_untouched()


@pytest.mark.slow
def test_later_runs_neither_compile_nor_leak(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(2)
    sides = [(numbers(n, "f32", n), numbers(n, "f32", n + 1)) for n in (5, 1000, 3 * CHUNK)]
    program = run("lerp", sides, "f32", "f32")
    made = dict(registry._loaded)
    monkeypatch.setattr("fastema.engine.cpu_group.kernel", None)  # must not be called again
    monkeypatch.setattr("fastema.engine.cpu_group.build_indexed_tables", None)
    tracemalloc.start()
    try:
        held = []
        for _ in range(4):
            for _ in range(2500):  # more than the interpreter's free lists hold
                program.run({"all": "lerp"}, LaunchArgs((W,)))
            time.sleep(0.3)  # late helper threads still empty their queue
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert registry._loaded == made
    # A leak grows in every round and other memory also shrinks, so check the least growth.
    assert min(np.diff(held)) < 2500
