"""Variables of TensorFlow, and an average of them."""

from typing import Any

import numpy as np
import tensorflow as tf

from fastema.tensorflow import ExponentialMovingAverage

SHAPES = [(), (0, 3), (1,), (7,), (5, 4), (3, 1, 2, 2), (300, 41)]
CODES = {"f16": tf.float16, "bf16": tf.bfloat16, "f32": tf.float32, "f64": tf.float64}
SCALE = 4.0  # no weight of these tests is larger
LARGE = 300_000  # of which an update takes long enough for a race to show

Rng = np.random.Generator


def drawn(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-SCALE, SCALE, shape)


def variables(rng: Rng, code: str = "f32", shapes: Any = SHAPES) -> list[Any]:
    return [tf.Variable(tf.cast(drawn(rng, s), CODES[code]), name=f"v/{len(s)}") for s in shapes]


def averaged(rng: Rng, decay: float = 0.9, *given: Any) -> tuple[list[Any], Any]:
    """Variables, and their average, which begins with what they were before they moved."""
    weights, ema = variables(rng, *given), ExponentialMovingAverage(decay)
    ema.apply(weights)
    move(rng, weights)
    return weights, ema


def move(rng: Rng, weights: list[Any]) -> None:
    for weight in weights:
        weight.assign(tf.cast(drawn(rng, tuple(weight.shape)), weight.dtype))


def values(weights: Any) -> list[np.ndarray]:
    """Copies, in float64."""
    return [np.array(weight.numpy(), np.float64) for weight in weights]


def stored(variable: Any) -> np.ndarray:
    """A copy as the reference wants it: bfloat16 as bits."""
    array = np.array(variable.numpy())
    return array.view(np.uint16) if variable.dtype == tf.bfloat16 else array
