"""Several averages of one tensor in one run: the same bits as one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest

from fastema.engine.program import Program
from fastema.kernels.table import SHARED_CHUNK
from fastema.layout.device_context import LaunchArgs
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

from ..support import reference

Make = Callable[..., np.ndarray]
Spec = Callable[[np.ndarray, str], TensorSpec]

pytestmark = pytest.mark.usefixtures("eager")

WEIGHTS = (0.3, 0.01, 0.0009765625, 1.0)
SIZES = [0, 1, 65, SHARED_CHUNK - 1, 2 * SHARED_CHUNK + 77, 0, 300]
SEED, STEP = 5, 6


def run(pairs: Sequence[Pair], weights: Sequence[float]) -> None:
    Program({"all": pairs}).run({"all": "lerp"}, LaunchArgs(weights, SEED, STEP))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("dst", "src", "form"),
    [("f32", "f32", ""), ("f32", "bf16", ""), ("bf16", "bf16", "bf16~"), ("f64", "f32", "")],
)
def test_the_same_bits_as_alone(
    dst: str,
    src: str,
    form: str,
    workers: int,
    count: int,
    numbers: Make,
    spec_of: Spec,
    bits: Make,
    threads: Callable[[int], None],
) -> None:
    threads(workers)
    sources = [numbers(n, src, i) for i, n in enumerate(SIZES)]
    starts = {(i, k): numbers(n, dst, 9 * i + k) for i, n in enumerate(SIZES) for k in range(count)}

    def pair(a: np.ndarray, i: int, k: int, form: str) -> Pair:
        return Pair(f"t{i}", spec_of(a, dst), spec_of(sources[i], src), form, average_index=k)

    together = {at: start.copy() for at, start in starts.items()}
    run([pair(a, *at, form) for at, a in together.items()], WEIGHTS[:count])
    for (i, k), got in together.items():
        words = None
        if form:
            key = reference.tensor_key(f"t{i}", k)
            words = reference.random_words(SEED, STEP, key, np.arange(got.size))
        want = reference.lerp(starts[i, k], sources[i], WEIGHTS[k], dst, src, words)
        np.testing.assert_array_equal(bits(got), bits(want))
        if not form:
            alone = starts[i, k].copy()
            run([pair(alone, i, 0, form)], WEIGHTS[k : k + 1])
            np.testing.assert_array_equal(bits(got), bits(alone))


def test_layouts_and_dtypes_mixed(numbers: Make, spec_of: Spec) -> None:
    """Adjacent and spaced tensors of three dtypes, three averages each, in one run."""
    shape, weights = (70, 40), WEIGHTS[:3]
    pairs, expected = [], []
    for i, (dst, src, way) in enumerate(product(["f32", "f64"], ["f32", "bf16"], [0, 1])):
        x = numbers(2800, src, i).reshape(shape[:: 1 - 2 * way])
        x = x.T if way else x
        for k in range(3):
            # The average's own order of axes differs from that of half of the weights.
            a = numbers(2800, dst, 100 * i + k).reshape(shape)
            pairs.append(Pair(f"t{i}", spec_of(a, dst), spec_of(x, src), average_index=k))
            sides = a.copy(), np.ascontiguousarray(x)
            expected.append((a, reference.lerp(*sides, weights[k], dst, src)))
    run(pairs, weights)
    for got, want in expected:
        np.testing.assert_array_equal(got, want)
