"""``fastema.tensorflow`` with Keras, in a process where TensorFlow is its backend."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from fastema.tensorflow import ExponentialMovingAverage

from ..support.process import ROOT, run_python
from .variables import draw

pytestmark = pytest.mark.tensorflow

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="needs KERAS_BACKEND=tensorflow"
)


@pytest.mark.slow
def test_with_keras_on_tensorflow_in_another_process() -> None:
    arguments = "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", __file__
    done = run_python(*arguments, environment={"KERAS_BACKEND": "tensorflow"}, cwd=ROOT)
    assert "1 passed" in done.stdout, done.stdout


@on_tensorflow
def test_keras_model_averages_itself_during_fit(rng: np.random.Generator, tmp_path: Path) -> None:
    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(2)
            self.ema = ExponentialMovingAverage(0.75)

        def call(self, x: Any) -> Any:
            return self.dense(x)

        def train_step(self, data: Any) -> Any:
            logs = super().train_step(data)
            self.ema.apply(self.trainable_variables)
            return logs

    def follow(batch: int, logs: Any) -> None:
        now = model.dense.kernel.numpy().astype(np.float64)
        seen.append(seen[-1] + 0.25 * (now - seen[-1]))

    x = draw(rng, (40, 3)).astype(np.float32)
    model = Model()
    model(x)
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=False)
    seen = [model.dense.kernel.numpy().astype(np.float64)]
    model.ema.apply(model.trainable_variables)
    note = keras.callbacks.LambdaCallback(on_train_batch_end=follow)
    model.fit(x, x[:, :2], batch_size=8, epochs=3, verbose=0, callbacks=[note])
    assert len(seen) == 16
    average = model.ema.average(model.dense.kernel)
    assert average is model.ema.average(model.dense.kernel.value)
    np.testing.assert_allclose(average.numpy(), seen[-1], atol=1e-6)
    assert np.abs(seen[-1] - model.dense.kernel.numpy()).max() > 1e-4
    path = tf.train.Checkpoint(model).save(tmp_path / "keras")
    other = Model()
    other(x)
    tf.train.Checkpoint(other).restore(path).expect_partial()
    other.ema.apply(other.trainable_variables)
    want = 0.75 * average.numpy() + 0.25 * other.dense.kernel.numpy()
    np.testing.assert_allclose(other.ema.average(other.dense.kernel).numpy(), want, atol=1e-6)
