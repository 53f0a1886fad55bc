"""GPU kernels, their threads run one after another on the host, equal the CPU kernels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastema.engine.program import Program
from fastema.layout.device_context import LaunchArgs
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

from ..support.arrays import lay_out_guarded, numbers, spec_of
from ..support.stub_gpu import StubGpu, gpu

__all__ = ["gpu"]

FLOATS = ("f64", "f32", "f16", "bf16")
LENGTHS = [(1, 0, 0), (64, 0, 0), (1003, 0, 0), (1003, 1, 2), (517, 8, 8), (70_001, 0, 0)]
"""Number of elements, and each side's offset from a cache line in elements."""

Array = np.ndarray
Describe = Callable[..., TensorSpec]


def run(operation: str, pairs: list[Pair], args: LaunchArgs | None = None) -> Program:
    program = Program({"all": pairs})
    program.run({"all": operation}, args or LaunchArgs((0.1,), 3, 2**40 + 5))
    return program


def assert_same_on_both(gpu: StubGpu, work: Callable[[Describe], list[Array]]) -> None:
    """Assert that a run launches on the GPU and leaves the same bits there as on the CPU.

    `work` creates arrays, describes them with the function that it gets, runs a program, and
    returns the arrays to compare.
    """

    def there(array: Array, code: str, **more: Any) -> TensorSpec:
        return spec_of(array, code, "cuda:0", context=gpu.context, **more)

    one, other = work(spec_of), work(there)
    assert gpu.driver.take()
    for a, b in zip(one, other, strict=True):
        assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def draw(size: int, code: str, seed: int, off: int = 0) -> Array:
    return lay_out_guarded(numbers(size, code, seed), off).array


def formats_of(dst: str, src: str, operation: str) -> list[str]:
    forms = [""]
    if operation == "lerp" and dst in ("f16", "bf16"):
        forms.append(f"{dst}~")
    if dst == "bf16" and src != "f64" and operation not in ("park", "unpark"):
        forms.append("bf16+16")
    return forms


CASES = [("lerp", dst, src) for dst in FLOATS for src in FLOATS] + [
    *(
        (operation, dst, src)
        for operation in ("copy", "swap", "cast_back", "add")
        for dst, src in (("f32", "bf16"), ("bf16", "f16"), ("f64", "f32"))
    ),
    *(("park", "f32", "bf16"), ("unpark", "f32", "bf16")),
]
USUAL = {
    *(("lerp", "f32", "bf16"), ("lerp", "bf16", "f32"), ("park", "f32", "bf16")),
    *(("copy", "f32", "bf16"), ("swap", "bf16", "f16"), ("add", "f64", "f32")),
}
"""Cases of the fast tests: each compiles two kernels, one for either device."""


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("operation", "dst", "src"),
    [pytest.param(*case, marks=[] if case in USUAL else pytest.mark.slow) for case in CASES],
)
def test_tensors_of_any_size_and_alignment_equal_the_cpu(
    gpu: StubGpu, operation: str, dst: str, src: str
) -> None:
    for form in formats_of(dst, src, operation):

        def work(describe: Describe, form: str = form) -> list[Array]:
            kept: list[Array] = []
            for seed, (size, off, other) in enumerate(LENGTHS):
                a, b = draw(size, dst, seed, off), draw(size, src, 9 + seed, other)
                before = a.tobytes() + b.tobytes()
                residual = draw(size, "i16", seed, off)
                companion = describe(residual, "i16") if form == "bf16+16" else None
                run(operation, [Pair("x", describe(a, dst), describe(b, src), form, companion)])
                assert before != a.tobytes() + b.tobytes()
                kept += [a, b, residual]
            return kept

        assert_same_on_both(gpu, work)


@pytest.mark.slow
@pytest.mark.parametrize(("dst", "src"), [("f32", "f32"), ("bf16", "bf16"), ("f32", "f64")])
def test_strided_tensors_equal_the_cpu(gpu: StubGpu, dst: str, src: str) -> None:
    def work(describe: Describe) -> list[Array]:
        a = draw(6000, dst, 3).reshape(30, 40, 5)[:, ::2, 1:4]
        b = draw(6000, src, 4).reshape(5, 40, 30).transpose(2, 1, 0)[:, ::2, 1:4]
        form = f"{dst}~" if dst == "bf16" else ""
        run("lerp", [Pair("x", describe(a, dst), describe(b, src), form)])
        return [a, b]

    assert_same_on_both(gpu, work)


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
def test_random_bits_follow_indices_instead_of_memory_order(
    gpu: StubGpu, dst: str, src: str, order: str
) -> None:
    shape, axes, whole, offset = ORDERS[order]
    size, stored = int(np.prod(shape)), [shape[axis] for axis in axes]

    def work(describe: Describe) -> list[Array]:
        a, b = (
            draw(size, code, seed).reshape(stored).transpose(np.argsort(axes))
            for seed, code in enumerate((dst, src))
        )
        weights = describe(b, src, whole=whole, offset=offset)
        run("lerp", [Pair("x", describe(a, dst), weights, f"{dst}~")])
        return [a]

    assert_same_on_both(gpu, work)


@pytest.mark.slow
@pytest.mark.parametrize("src", ["f32", "bf16"])
def test_several_averages_equal_the_cpu(gpu: StubGpu, src: str) -> None:
    def work(describe: Describe) -> list[Array]:
        x = draw(40_003, src, 4)
        averages = [draw(40_003, "f32", 5 + k) for k in range(3)]
        pairs = [
            Pair("x", describe(a, "f32"), describe(x, src), average_index=k)
            for k, a in enumerate(averages)
        ]
        run("lerp", pairs, LaunchArgs((0.1, 0.01, 0.0)))
        return averages

    assert_same_on_both(gpu, work)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 777, 1002])
def test_nonfinite_values_are_found(gpu: StubGpu, place: int, value: float) -> None:
    x = numbers(1003, "f32", 5)
    there = {"code": "f32", "device": "cuda:0", "context": gpu.context}
    program = run("finite", [Pair("x", spec_of(np.ones_like(x), **there), spec_of(x, **there))])
    assert program.all_finite()
    x[place] = value
    program.run({"all": "finite"})
    assert not program.all_finite()


@pytest.mark.slow
@pytest.mark.parametrize(("dst", "src", "ring"), [("f32", "f32", "f32"), ("f32", "bf16", "bf16")])
def test_windowed_means_equal_the_cpu(gpu: StubGpu, dst: str, src: str, ring: str) -> None:
    size, slots = 40_003, 3

    def work(describe: Describe) -> list[Array]:
        mean, x, residual = draw(size, dst, 6), draw(size, src, 7), draw(size, "f32", 8)
        room = -(-size // 64) * 64  # rings start every slot at a cache line
        kept = draw(slots * room, ring, 9).reshape(slots, room)
        pair = Pair("x", describe(mean, dst), describe(x, src), "", describe(residual, "f32"))
        pair = pair._replace(ring=(describe(kept[0, :size], ring), kept.strides[0]))
        program = Program({"all": [pair]})
        for turn in range(1, 9):
            x[:] = numbers(size, src, 20 + turn)
            filled = float(min(turn, slots))
            args = LaunchArgs((filled,), 0, 0, slots, (turn - 1) % slots, turn)
            program.run({"all": "window"}, args)
        return [mean, residual, kept]

    assert_same_on_both(gpu, work)
