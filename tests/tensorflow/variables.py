"""TensorFlow variables, and an average of them."""

from typing import Any

import numpy as np
import tensorflow as tf

from fastema.tensorflow import ExponentialMovingAverage

SHAPES = [(), (0, 3), (1,), (7,), (5, 4), (3, 1, 2, 2), (300, 41)]
CODES = {"f16": tf.float16, "bf16": tf.bfloat16, "f32": tf.float32, "f64": tf.float64}
SCALE = 4.0  # no weight of these tests is larger
LARGE = 300_000  # elements: an update takes long enough to show a race

Rng = np.random.Generator


def draw(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-SCALE, SCALE, shape)


def variables(rng: Rng, code: str = "f32", shapes: Any = SHAPES) -> list[Any]:
    return [tf.Variable(tf.cast(draw(rng, s), CODES[code]), name=f"v/{len(s)}") for s in shapes]


def build_average(rng: Rng, decay: float = 0.9, *given: Any) -> tuple[list[Any], Any]:
    """Return variables and an average that started from their previous values."""
    weights, ema = variables(rng, *given), ExponentialMovingAverage(decay)
    ema.apply(weights)
    move(rng, weights)
    return weights, ema


def move(rng: Rng, weights: list[Any]) -> None:
    for weight in weights:
        weight.assign(tf.cast(draw(rng, tuple(weight.shape)), weight.dtype))


def values(weights: Any) -> list[np.ndarray]:
    """Return float64 copies."""
    return [np.array(weight.numpy(), np.float64) for weight in weights]


def to_array(variable: Any) -> np.ndarray:
    """Return a copy for the reference, bfloat16 as its bits."""
    array = np.array(variable.numpy())
    return array.view(np.uint16) if variable.dtype == tf.bfloat16 else array
