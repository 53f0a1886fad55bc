"""Random bits belong to elements of a whole tensor, however it is laid out and cut into parts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product

import numpy as np
import pytest

from fastema.engine.program import Program
from fastema.errors import LayoutError
from fastema.layout.device_context import LaunchArgs
from fastema.layout.group import Pair, check_pair
from fastema.layout.spec import TensorSpec

from ..support import reference

Array = np.ndarray
Make = Callable[..., Array]

SHAPE = (24, 10, 35)
SEED, STEP, WEIGHT = 2**40 + 3, 2**33 + 7, 0.3
WHOLES = {
    "small": ((40, 19, 60), (3, 2, 5)),
    "large": ((2**20, 2**10, 2**10), (2**19, 7, 0)),
    "over a multiple of 2**32": ((1000, 5000, 1001), (845, 673, 600)),
    "axes beyond 2**32": ((25, 11, 2**33), (1, 1, 2**32 - 17)),
}


def described(array: Array, code: str, **part: object) -> TensorSpec:
    strides = tuple(step // array.itemsize for step in array.strides)
    address = array.ctypes.data
    return TensorSpec(address, array.shape, strides, code, "cpu", owner=array, **part)


def in_order(array: Array, order: tuple[int, ...]) -> Array:
    """A copy whose axes lie in memory in this order."""
    return array.transpose(order).copy().transpose(np.argsort(order))


def update(avg: Array, x: Array, code: str, src: str, **part: object) -> None:
    pair = Pair("t", described(avg, code), described(x, src, **part), f"{code}~")
    Program({"all": [pair]}).run({"all": "lerp"}, LaunchArgs((WEIGHT,), SEED, STEP))


def specified(avg: Array, x: Array, code: str, src: str, index: Array) -> Array:
    words = reference.random_words(SEED, STEP, reference.tensor_key("t"), index)
    return reference.lerp(avg, x, WEIGHT, code, src, words)


@pytest.fixture(params=[("bf16", "bf16"), ("f16", "f32")], ids="-".join)
def sides(request: pytest.FixtureRequest, numbers: Make) -> tuple[Array, Array, str, str]:
    """An average, weights, and their dtypes."""
    avg, x = (numbers(int(np.prod(SHAPE)), code, i) for i, code in enumerate(request.param))
    return avg.reshape(SHAPE), x.reshape(SHAPE), *request.param


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_average_has_the_same_bits_in_every_order_of_axes(
    sides: tuple[Array, Array, str, str], order: tuple[int, ...]
) -> None:
    avg, x, code, src = sides
    want = specified(avg, x, code, src, np.arange(avg.size).reshape(SHAPE))
    for other in (order, (0, 1, 2)):
        got = in_order(avg, order)
        update(got, in_order(x, other), code, src)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("parts", [(1, 1, 3), (4, 1, 1), (1, 5, 2), (3, 2, 4)])
def test_average_has_the_same_bits_in_parts(
    sides: tuple[Array, Array, str, str], parts: tuple[int, ...]
) -> None:
    avg, x, code, src = sides
    want = specified(avg, x, code, src, np.arange(avg.size).reshape(SHAPE))
    got = np.empty_like(avg)
    cuts = [np.array_split(np.arange(n), count) for n, count in zip(SHAPE, parts, strict=True)]
    for i, axes in enumerate(product(*cuts)):
        places = tuple(slice(axis[0], axis[-1] + 1) for axis in axes)
        order = list(permutations(range(3)))[i % 6]
        part = in_order(avg[places], order)
        offset = tuple(int(axis[0]) for axis in axes)
        update(part, x[places], code, src, whole=SHAPE, offset=offset)
        got[places] = part
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("name", WHOLES)
def test_part_of_a_large_tensor_has_the_bits_of_its_indices(
    sides: tuple[Array, Array, str, str], name: str, order: tuple[int, ...]
) -> None:
    avg, x, code, src = sides
    whole, offset = WHOLES[name]
    axes = np.meshgrid(
        *(np.arange(n) + o for n, o in zip(SHAPE, offset, strict=True)), indexing="ij"
    )
    index = (axes[0] * whole[1] + axes[1]) * whole[2] + axes[2]
    assert (len(np.unique(index >> 32)) > 1) == ("2**32" in name)
    got = in_order(avg, order)
    update(got, in_order(x, order), code, src, whole=whole, offset=offset)
    np.testing.assert_array_equal(got, specified(avg, x, code, src, index))


def test_sides_that_are_different_parts_are_refused() -> None:
    x = np.zeros(8, np.float32)
    one, other = (described(x, "f32", whole=(24,), offset=(first,)) for first in (0, 8))
    check_pair(Pair("w", one, one))
    check_pair(Pair("w", described(x, "f32"), one))
    with pytest.raises(
        LayoutError, match=r"w: the average is the part at \(0,\).*\(8,\) of \[24\]"
    ):
        check_pair(Pair("w", one, other))
