"""What a GPU's threads do, run on the host one after the other: equal to the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from fastema.engine import cpu_group
from fastema.engine.program import Program
from fastema.kernels import cuda
from fastema.kernels.jit import cpu_kernel
from fastema.kernels.table import (
    AVERAGE,
    COLUMNS,
    DISTANCE,
    MEASURES,
    RESULTS,
    SEED,
    SLOT,
    SQUARE,
    STEP,
    STILL,
    TURN,
    WINDOW,
)
from fastema.kernels.words import load, pointer_f64, pointer_i64, store
from fastema.layout.device_context import LaunchArgs
from fastema.layout.dtypes import DTYPES
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

THREADS = 7
"""Few and odd, so that every thread has vectors, elements of the tail, or neither."""

FLOATS = ("f64", "f32", "f16", "bf16")
STORAGE = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}
LENGTHS = [(1, 0, 0), (64, 0, 0), (1003, 0, 0), (1003, 1, 2), (517, 8, 8), (70_001, 0, 0)]
"""Elements, and by how many of them the two sides begin off a cache line."""


@cache
def twin(operation: str, formats: tuple[str, ...], layout: str) -> Any:
    body = cuda.bodies(operation, formats, layout)

    def run(table, rows, numbers, control):  # type: ignore[no-untyped-def]
        cells, settings, values = pointer_i64(table), pointer_i64(control), pointer_f64(numbers)
        results = load(settings, RESULTS)
        now = (
            load(settings, SEED),
            load(settings, STEP),
            load(settings, WINDOW),
            load(settings, SLOT),
            load(settings, TURN),
        )
        for row in range(rows):
            at = row * COLUMNS
            number, one, two, three = load(values, load(cells, at + AVERAGE)), 0.0, 0.0, 0.0
            for thread in range(THREADS):
                a, b, c = body(cells, at, number, now, thread, THREADS)
                one, two, three = one + a, two + b, three + c
            if results != 0:
                measures = pointer_f64(results)
                store(measures, row * MEASURES + DISTANCE, one)
                store(measures, row * MEASURES + SQUARE, two)
                store(measures, row * MEASURES + STILL, three)

    return cpu_kernel()(run)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which programs run the twins."""
    return lambda: monkeypatch.setattr(cpu_group, "kernel", twin)


def numbers(generator: np.random.Generator, size: int, off: int, code: str) -> np.ndarray:
    line = np.zeros(size + 64, np.complex128).view(np.uint8)
    begin = -line.ctypes.data % 64 + off * DTYPES[code].itemsize
    stored = STORAGE.get(code, np.int16)
    array = line[begin : begin + size * DTYPES[code].itemsize].view(stored)
    if code == "bf16":
        floats = generator.standard_normal(size).astype(np.float32)
        array[:] = floats.view(np.uint32) >> 16
    elif code == "i16":
        array[:] = generator.integers(-(2**15), 2**15, size)
    else:
        array[:] = generator.standard_normal(size)
    return array


def spec(array: np.ndarray, code: str) -> TensorSpec:
    strides = tuple(step // array.itemsize for step in array.strides)
    return TensorSpec(array.ctypes.data, array.shape, strides, code, "cpu", owner=array)


def words(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def formats_of(dst: str, src: str, operation: str) -> list[str]:
    forms = [""]
    if operation == "lerp" and dst in ("f16", "bf16"):
        forms.append(f"{dst}~")
    if dst == "bf16" and src != "f64":
        forms.append("bf16+16")
    return forms


CASES = [("lerp", dst, src) for dst in FLOATS for src in FLOATS] + [
    (operation, dst, src)
    for operation in ("copy", "swap", "cast_back", "add")
    for dst, src in (("f32", "bf16"), ("bf16", "f16"), ("f64", "f32"))
]
USUAL = {
    *(("lerp", "f32", "bf16"), ("lerp", "bf16", "f32")),
    *(("copy", "f32", "bf16"), ("swap", "bf16", "f16"), ("add", "f64", "f32")),
}
"""Those of the fast tests: each takes two kernels to compile, one for either side."""


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("operation", "dst", "src"),
    [pytest.param(*case, marks=[] if case in USUAL else pytest.mark.slow) for case in CASES],
)
def test_two_sides(operation: str, dst: str, src: str, as_on_a_gpu: Callable[[], None]) -> None:
    for form in formats_of(dst, src, operation):
        runs = []
        for gpu in (False, True):
            if gpu:
                as_on_a_gpu()
            generator = np.random.default_rng(11)
            kept: list[bytes] = []
            for size, off, other in LENGTHS:
                a, residual = (
                    numbers(generator, size, off, dst),
                    numbers(generator, size, off, "i16"),
                )
                b = numbers(generator, size, other, src)
                before = words(a), words(b)
                companion = spec(residual, "i16") if form == "bf16+16" else None
                pair = Pair("x", spec(a, dst), spec(b, src), form, companion)
                Program({"all": [pair]}).run({"all": operation}, LaunchArgs((0.1,), 3, 2**40 + 5))
                assert before != (words(a), words(b))
                kept += [words(a), words(b), words(residual)]
            runs.append(kept)
        assert runs[0] == runs[1], form


@pytest.mark.parametrize("operation", ["park", pytest.param("unpark", marks=pytest.mark.slow)])
def test_parking(operation: str, as_on_a_gpu: Callable[[], None]) -> None:
    runs = []
    for gpu in (False, True):
        if gpu:
            as_on_a_gpu()
        generator = np.random.default_rng(2)
        kept = []
        for size, off, other in LENGTHS:
            a, b = numbers(generator, size, off, "f32"), numbers(generator, size, other, "bf16")
            pair = Pair("x", spec(a, "f32"), spec(b, "bf16"))
            Program({"all": [pair]}).run({"all": operation})
            kept += [words(a), words(b)]
        runs.append(kept)
    assert runs[0] == runs[1]


@pytest.mark.slow
@pytest.mark.parametrize(("dst", "src"), [("f32", "f32"), ("bf16", "bf16"), ("f32", "f64")])
def test_spaced_elements(dst: str, src: str, as_on_a_gpu: Callable[[], None]) -> None:
    runs = []
    for gpu in (False, True):
        if gpu:
            as_on_a_gpu()
        generator = np.random.default_rng(3)
        a = numbers(generator, 6000, 0, dst).reshape(30, 40, 5)[:, ::2, 1:4]
        b = numbers(generator, 6000, 0, src).reshape(5, 40, 30).transpose(2, 1, 0)[:, ::2, 1:4]
        form = f"{dst}~" if dst == "bf16" else ""
        program = Program({"all": [Pair("x", spec(a, dst), spec(b, src), form)]})
        program.run({"all": "lerp"}, LaunchArgs((0.3,), 1, 7))
        runs.append((words(a), words(b)))
    assert runs[0] == runs[1]


ORDERS = {
    "columns of a shard": ((90, 56), (0, 1), (4000, 300), (7, 9)),
    "odd columns of a shard": ((90, 57), (0, 1), (4000, 300), (7, 9)),
    "channels last": ((40, 24, 9), (0, 2, 1), None, None),
    "few channels": ((64, 3, 49), (0, 2, 1), None, None),
    "over a multiple of 2**32": ((11, 6, 35), (0, 1, 2), (1000, 5000, 1001), (855, 673, 600)),
}


@pytest.mark.each_value
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("dst", "src"),
    [
        ("bf16", "bf16"),
        pytest.param("bf16", "f32", marks=pytest.mark.slow),
        pytest.param("f16", "f64", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "operation", ["lerp", pytest.param("lerp_measured", marks=pytest.mark.slow)]
)
def test_indices_in_another_order_than_memory(
    operation: str, dst: str, src: str, order: str, as_on_a_gpu: Callable[[], None]
) -> None:
    shape, axes, whole, offset = ORDERS[order]
    size, stored = int(np.prod(shape)), [shape[axis] for axis in axes]
    runs = []
    for gpu in (False, True):
        if gpu:
            as_on_a_gpu()
        generator = np.random.default_rng(7)
        a, b = (
            numbers(generator, size, 0, code).reshape(stored).transpose(np.argsort(axes))
            for code in (dst, src)
        )
        weights = replace(spec(b, src), whole=whole, offset=offset)
        program = Program({"all": [Pair("x", spec(a, dst), weights, f"{dst}~")]})
        program.run({"all": operation}, LaunchArgs((0.3,), 1, 7))
        runs.append(words(a))
    assert runs[0] == runs[1]


@pytest.mark.slow
@pytest.mark.parametrize("src", ["f32", "bf16"])
def test_several_averages_and_measures(src: str, as_on_a_gpu: Callable[[], None]) -> None:
    runs = []
    for gpu in (False, True):
        if gpu:
            as_on_a_gpu()
        generator = np.random.default_rng(4)
        x = numbers(generator, 40_003, 0, src)
        averages = [numbers(generator, 40_003, 0, "f32") for _ in range(3)]
        pairs = [
            Pair("x", spec(a, "f32"), spec(x, src), average_index=k) for k, a in enumerate(averages)
        ]
        program = Program({"all": pairs})
        program.run({"all": "lerp_measured"}, LaunchArgs((0.1, 0.01, 0.0)))
        runs.append(([words(a) for a in averages], [program.measured(k) for k in range(3)]))
    assert runs[0][0] == runs[1][0]
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert runs[1][1][2].still == 40_003


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 777, 1002])
def test_what_is_not_finite_is_found(
    place: int, value: float, as_on_a_gpu: Callable[[], None]
) -> None:
    as_on_a_gpu()
    x = np.random.default_rng(5).standard_normal(1003).astype(np.float32)
    program = Program({"all": [Pair("x", spec(np.ones_like(x), "f32"), spec(x, "f32"))]})
    program.run({"all": "finite"})
    assert program.all_finite()
    x[place] = value
    program.run({"all": "finite"})
    assert not program.all_finite()


@pytest.mark.slow
@pytest.mark.parametrize(("dst", "src", "ring"), [("f32", "f32", "f32"), ("f32", "bf16", "bf16")])
def test_windowed_mean(dst: str, src: str, ring: str, as_on_a_gpu: Callable[[], None]) -> None:
    size, slots = 40_003, 3
    runs = []
    for gpu in (False, True):
        if gpu:
            as_on_a_gpu()
        generator = np.random.default_rng(6)
        mean, x = numbers(generator, size, 0, dst), numbers(generator, size, 0, src)
        residual = numbers(generator, size, 0, "f32")
        room = -(-size // 64) * 64  # as rings are allocated: every slot begins at a cache line
        kept = numbers(generator, slots * room, 0, ring).reshape(slots, room)
        pair = Pair("x", spec(mean, dst), spec(x, src), "", spec(residual, "f32"))
        pair = pair._replace(ring=(spec(kept[0, :size], ring), kept.strides[0]))
        program = Program({"all": [pair]})
        for turn in range(1, 9):
            x[:] = numbers(generator, size, 0, src)
            filled = float(min(turn, slots))
            program.run(
                {"all": "window"},
                LaunchArgs((filled,), 0, 0, slots, (turn - 1) % slots, turn),
            )
        runs.append((words(mean), words(residual), words(kept)))
    assert runs[0] == runs[1]
