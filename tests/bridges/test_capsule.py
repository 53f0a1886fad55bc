from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastema
from fastema.bridges import dlpack as bridge
from fastema.bridges.registry import bridge_of, describe
from fastema.errors import BridgeError, DTypeError, LayoutError


class Current:
    """An array of a framework nobody has heard of, which speaks version 1 of the protocol."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


class Old(Current):
    def __dlpack__(self) -> Any:
        return self.array.__dlpack__()


class Copying(Old):
    def __dlpack__(self) -> Any:
        return self.array.copy().__dlpack__()


class Elsewhere(Current):
    def __dlpack_device__(self) -> tuple[int, int]:
        return 8, 0


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("kind", [Current, Old])
@pytest.mark.parametrize(
    "array",
    [
        numbers(5, 7),
        numbers(5, 7).T,
        numbers(9, 8)[::2, 1::3],
        numbers(6)[::-1],
        numbers(),
        numbers(3, 0),
        numbers(4, dtype=np.float16),
        numbers(4, dtype=np.complex128),
        np.array([True, False, True]),
        np.arange(5, dtype=np.uint16),
        np.arange(5, dtype=np.int8),
    ],
)
def test_description_is_that_of_the_array(kind: type[Current], array: np.ndarray) -> None:
    mine, known = describe(kind(array)), describe(array)
    assert bridge_of(kind(array)) is bridge
    assert (mine.shape, mine.dtype, mine.device) == (known.shape, known.dtype, "cpu")
    if array.size:
        assert (mine.address, mine.strides) == (known.address, known.strides)
    assert mine.writable is (kind is Current)


def test_what_cannot_be_used() -> None:
    array = numbers(3)
    with pytest.raises(BridgeError, match="copies"):
        describe(Copying(array))
    with pytest.raises(BridgeError, match="device 8"):
        describe(Elsewhere(array))
    read_only = numbers(3)
    read_only.flags.writeable = False
    with pytest.raises(BridgeError, match="Old"):
        describe(Old(read_only))
    assert not describe(Current(read_only)).writable
    torch = pytest.importorskip("torch")
    with pytest.raises(DTypeError, match="DLPack dtype"):
        describe(Current(torch.zeros(3, dtype=torch.float8_e4m3fn)))


def test_an_average_of_such_arrays() -> None:
    first, second = numbers(6, 5), numbers(3, seed=1)
    weights = {"a": Current(first), "b": [Current(second)]}
    before = [first.astype(float), second.astype(float)]
    ema = fastema.EMA(weights, 0.75)
    first += 4
    second *= -2
    ema.update()
    expected = [0.75 * b + 0.25 * x for b, x in zip(before, (first, second), strict=True)]
    for name, truth in zip(("a", "b.0"), expected, strict=True):
        np.testing.assert_allclose(ema.shadow[name], truth, rtol=1e-6, atol=1e-6)
        assert type(ema.shadow[name]) is np.ndarray
    raw = first.tobytes()
    average = ema.shadow["a"].tobytes()
    with ema.swapped():
        assert first.tobytes() == average
    assert first.tobytes() == raw


def test_the_old_protocol_is_only_read() -> None:
    average, weights = numbers(4), numbers(4, seed=1)
    expected = average + 0.5 * (weights - average)
    fastema.lerp_([average], [Old(weights)], 0.5)
    np.testing.assert_allclose(average, expected, rtol=1e-6)
    with pytest.raises(LayoutError, match="read-only"):
        fastema.lerp_([Old(average)], [weights], 0.5)
