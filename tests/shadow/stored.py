"""Tensors as the specification has them: arrays of what is stored, in the order of indices."""

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
    """The code of a tensor's dtype."""
    return CODES[tensor.dtype]


def stored(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor's elements; bfloat16 as their bits."""
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    if tensor.dtype == torch.bfloat16:
        return copied.view(torch.int16).numpy().view(np.uint16)
    return copied.numpy()


def exact(tensor: Tensor) -> np.ndarray:
    """The float64 numbers that a tensor holds."""
    return reference.decode(stored(tensor), code_of(tensor))


def indices(average: Tensor) -> np.ndarray | None:
    """What random bits depend on of each element, in an average that has 16 bits."""
    if code_of(average) not in ("bf16", "f16"):
        return None
    return np.arange(average.numel()).reshape(average.shape)


class Specified:
    """What an average of one tensor must be, to the bit."""

    def __init__(
        self, average: Tensor, name: str, *, which: int = 0, seed: int = 0, random: bool = True
    ) -> None:
        self.value, self.code = stored(average), code_of(average)
        self.key, self.seed = reference.tensor_key(name, which), seed
        self.index = indices(average) if random else None

    def update(self, weights: Tensor, weight: float, step: int) -> None:
        """Follow an update."""
        words = None
        if self.index is not None:
            words = reference.random_words(self.seed, step, self.key, self.index)
        x = stored(weights)
        self.value = reference.lerp(self.value, x, weight, self.code, code_of(weights), words)

    def check(self, average: Tensor) -> None:
        """The average is that, to the bit."""
        got = stored(average)
        assert got.dtype == self.value.dtype
        one, other = (np.frombuffer(side.tobytes(), np.uint8) for side in (got, self.value))
        np.testing.assert_array_equal(one, other)


def same(one: Any, other: Any) -> bool:
    """Whether two mappings of tensors are equal, bit for bit."""
    return list(one) == list(other) and all(
        np.array_equal(stored(one[name]), stored(other[name]), equal_nan=False) for name in one
    )
