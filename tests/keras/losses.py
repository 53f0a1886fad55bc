"""Linear models, whose losses NumPy can compute, and helpers to train them."""

from typing import Any

import keras
import numpy as np

from .data import BACKEND
from .models import sync_jax, values

COMPILED = BACKEND != "torch"
BATCH, COUNT = 8, 45  # five batches of 8, and one of 5
BATCHES = 6
Curve = np.ndarray

_draw = np.random.default_rng(23)
X = _draw.normal(size=(COUNT, 4)).astype(np.float32)
Y = np.sin(X.sum(1, keepdims=True)).astype(np.float32)
W = _draw.uniform(0.2, 3.0, COUNT).astype(np.float32)


def build(rate: float = 0.05, *, kind: type = keras.Sequential, **compiled: Any) -> Any:
    """Build a linear model, whose loss NumPy can compute."""
    keras.utils.set_random_seed(7)
    model = kind([keras.Input((4,)), keras.layers.Dense(1, name="only")])
    model.compile(**{"optimizer": keras.optimizers.SGD(rate), "loss": "mse", **compiled})
    return model


def fit(model: Any, *callbacks: Any, y: Any = Y, **options: Any) -> Any:
    options = {"epochs": 2, "batch_size": BATCH, "verbose": 0, "shuffle": False, **options}
    return model.fit(X, y, callbacks=[*callbacks], **options)


def split_batches(values: np.ndarray) -> list[np.ndarray]:
    """Split an array into batches."""
    return [values[i : i + BATCH] for i in range(0, len(values), BATCH)]


def float64_weights(model: Any) -> list[np.ndarray]:
    return [one.astype(np.float64) for one in values(sync_jax(model).weights)]


class BatchErrors(keras.callbacks.Callback):
    """Compute the model's errors on each batch, before the step, in float64."""

    def __init__(self, y: np.ndarray = Y) -> None:
        super().__init__()
        self.y = y
        self.batches: list[np.ndarray] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        kernel, bias = float64_weights(self.model)
        x, y = split_batches(X)[batch], split_batches(self.y)[batch]
        self.batches.append((x @ kernel + bias - y)[:, 0])


class LogRecorder(keras.callbacks.Callback):
    """Record the logs that callbacks after ours receive."""

    async_safe = True

    def __init__(self) -> None:
        super().__init__()
        self.batches: dict[int, dict[str, float]] = {}
        self.epochs: list[dict[str, float]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches[batch + 100_000 * len(self.epochs)] = dict(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append(dict(logs))

    def curve(self, name: str) -> Curve:
        return np.array([self.batches[key][name] for key in sorted(self.batches)])


def assert_exact(got: Any, want: Any, roundings: int = 12) -> None:
    """Allow a few float32 roundings: Keras may sum the loss in another order."""
    want = np.asarray(want, np.float64)
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=roundings * 2.0**-24, atol=1e-7)
