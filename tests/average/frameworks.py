"""Named arrays of the frameworks whose weights are averaged without a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes  # noqa: F401  # gives NumPy the name bfloat16
import numpy as np
import pytest

from ..support.requirements import require_packages

FRAMEWORKS = ["numpy", "jax", pytest.param("tensorflow", marks=pytest.mark.tensorflow)]
SHAPES = {"a": (70,), "b": (3, 5), "c": (), "d": (0, 2), "e": (2, 3, 4)}
FLOATS = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
DTYPES = [*FLOATS.values(), "complex64", "complex128"]


def values(seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return normal random numbers in several shapes, none of them zero."""
    generator = np.random.default_rng(seed)
    return {n: np.asarray(generator.normal(size=s)).astype(dtype) for n, s in SHAPES.items()}


def bit_patterns(dtype: str, seed: int) -> np.ndarray:
    """Return every kind of bit pattern: NaN payloads, infinities, signed zeros, subnormals."""
    kind = np.dtype(dtype)
    generator = np.random.default_rng([seed, kind.itemsize])
    found = generator.integers(0, 256, 900 * kind.itemsize, np.uint8).view(kind)
    words = found.view(f"u{min(kind.itemsize, 8)}")
    high = np.array(1, words.dtype) << np.array(8 * words.itemsize - 1, words.dtype)
    words[:2] = 0, high
    found[4:7] = np.array([np.nan, np.inf, -np.inf], np.float32).astype(kind)
    words[8] = (words[4] if kind.kind != "c" else words[8]) ^ np.array(5, words.dtype)
    return found


class Framework:
    """Creates and reads arrays; ``kind`` is the class of arrays that an average returns."""

    kind: type = np.ndarray

    def make(self, array: np.ndarray) -> Any:
        return array.copy()

    def read(self, one: Any) -> np.ndarray:
        return np.asarray(one)

    def train(self, weights: dict[str, Any], new: dict[str, np.ndarray]) -> tuple[Any, ...]:
        """Take a training step, and return the arguments of the ``update()`` that follows."""
        for name, array in new.items():
            weights[name][...] = array
        return ()

    def bits(self, weights: Any) -> dict[str, bytes]:
        return {name: self.read(one).tobytes() for name, one in weights.items()}

    def wide(self, weights: Any) -> dict[str, np.ndarray]:
        return {name: self.read(one).astype(np.float64) for name, one in weights.items()}

    def make_all(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        return {name: self.make(array) for name, array in arrays.items()}


class Jax(Framework):
    """A framework whose training step builds a new tree."""

    def __init__(self) -> None:
        import jax

        self.kind = jax.Array
        self.make = jax.numpy.asarray

    def train(self, weights: dict[str, Any], new: dict[str, np.ndarray]) -> tuple[Any, ...]:
        weights.update(self.make_all(new))
        return (dict(weights),)


class TensorFlow(Framework):
    """A framework whose training step assigns new tensors to variables."""

    def __init__(self) -> None:
        import tensorflow as tf

        self.kind = tf.Tensor
        self.make = tf.Variable

    def read(self, one: Any) -> np.ndarray:
        # NumPy alone cannot convert a bfloat16 scalar of TensorFlow.
        return np.asarray(one.numpy() if hasattr(one, "numpy") else one)

    def train(self, weights: dict[str, Any], new: dict[str, np.ndarray]) -> tuple[Any, ...]:
        for name, array in new.items():
            weights[name].assign(array)
        return ()


@contextmanager
def open_framework(name: str) -> Iterator[Framework]:
    """Yield a framework; 64-bit numbers are enabled in JAX."""
    require_packages(name)
    if name != "jax":
        yield {"numpy": Framework, "tensorflow": TensorFlow}[name]()
        return
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield Jax()
    jax.config.update("jax_enable_x64", before)
