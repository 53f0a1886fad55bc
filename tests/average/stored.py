"""Tensors in the form of the specification: arrays of stored values, in index order."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..support import reference

CODES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def code_of(tensor: Tensor) -> str:
    """Return the code of a tensor's dtype."""
    return CODES[tensor.dtype]


def stored(tensor: Tensor) -> np.ndarray:
    """Return a copy of a tensor's elements; bfloat16 as uint16 bits."""
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    if tensor.dtype == torch.bfloat16:
        return copied.view(torch.int16).numpy().view(np.uint16)
    return copied.numpy()


def exact(tensor: Tensor) -> np.ndarray:
    """Return a tensor's numbers as float64."""
    return reference.decode(stored(tensor), code_of(tensor))


def indices(average: Tensor) -> np.ndarray | None:
    """Return the indices that random bits depend on; None unless the average has 16 bits."""
    if code_of(average) not in ("bf16", "f16"):
        return None
    return np.arange(average.numel()).reshape(average.shape)


class ReferenceAverage:
    """The reference value of one tensor's average, to the bit."""

    def __init__(
        self, average: Tensor, name: str, *, which: int = 0, seed: int = 0, random: bool = True
    ) -> None:
        self.value, self.code = stored(average), code_of(average)
        self.key, self.seed = reference.tensor_key(name, which), seed
        self.index = indices(average) if random else None

    def update(self, weights: Tensor, weight: float, step: int) -> None:
        """Apply one update to the reference value."""
        words = None
        if self.index is not None:
            words = reference.random_words(self.seed, step, self.key, self.index)
        x = stored(weights)
        self.value = reference.lerp(self.value, x, weight, self.code, code_of(weights), words)

    def check(self, average: Tensor) -> None:
        """Assert that an average equals the reference value, to the bit."""
        got = stored(average)
        assert got.dtype == self.value.dtype
        one, other = (np.frombuffer(side.tobytes(), np.uint8) for side in (got, self.value))
        np.testing.assert_array_equal(one, other)


def is_same(one: Any, other: Any) -> bool:
    """Return whether two mappings of tensors are equal, bit for bit."""
    return list(one) == list(other) and all(
        np.array_equal(stored(one[name]), stored(other[name]), equal_nan=False) for name in one
    )
