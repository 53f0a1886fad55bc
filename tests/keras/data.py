"""The data on which the cases for Keras train."""

from typing import Any

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()
DECAY = 0.8
BATCH, BATCHES = 4, 6

MARKS = [
    pytest.mark.usefixtures("no_tensorflow"),
    # Warnings from Keras' use of TensorFlow, PyTorch and its own files.
    pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
]

_draw = np.random.default_rng(5)
X = _draw.normal(size=(BATCH * BATCHES, 4)).astype(np.float32)
Y = np.sin(X.sum(1, keepdims=True))
XV, YV = X[::3] + np.float32(0.1), Y[::3]


def fit(model: Any, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    options = {"validation_data": (XV, YV), **options}
    return model.fit(
        X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=[*callbacks],
        **options,
    )  # fmt: skip
