"""Event files that TensorFlow and Keras' own callback write come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from fastema.tracking.logs import read

NEEDS = ("tensorboard",)

pytestmark = pytest.mark.tensorflow


def test_scalars_and_what_else_is_among_them(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=30).astype(np.float32)
    writer = tf.summary.create_file_writer(str(tmp_path))
    with writer.as_default():
        tf.summary.image("image", np.random.default_rng(1).random((1, 300, 300, 3)), step=0)
        for step, value in enumerate(values):
            tf.summary.scalar("loss", value, step=5 * step)
            tf.summary.histogram("weights", values, step=5 * step)
            tf.summary.text("note", "text", step=5 * step)
    writer.close()
    curves = read(tmp_path)
    assert set(curves) == {"step", "loss"}
    assert curves["loss"].steps.tolist() == list(range(0, 150, 5))
    np.testing.assert_array_equal(curves["loss"].values, values)


# Keras reads a variable of TensorFlow as NumPy will not have it any more.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_callback_of_keras(tmp_path: Path) -> None:
    import keras

    seen: list[float] = []
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = np.random.default_rng(0).normal(size=(2, 37, 4)).astype(np.float32)
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(logs["loss"]))
    )
    board = keras.callbacks.TensorBoard(tmp_path, update_freq="batch", write_graph=False)
    history = model.fit(
        x, y[:, :1], batch_size=8, epochs=2, verbose=0, validation_split=0.25,
        callbacks=[note, board],
    ).history  # fmt: skip
    curves = read(tmp_path)
    np.testing.assert_array_equal(curves["train/batch_loss"].values, np.float32(seen))
    validated = curves["validation/epoch_loss"]
    np.testing.assert_array_equal(validated.values, np.float32(history["val_loss"]))
    assert validated.steps.tolist() == [0, 1]
