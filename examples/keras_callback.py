"""Keras on any backend: validate with the average.

pip install fastema keras torch scikit-learn
KERAS_BACKEND=torch python examples/keras_callback.py
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
from digits import TRAINED, load, report

from fastema.keras import EMAWeights


def main() -> None:
    images, digits, labels = (one.numpy() for one in load())
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            *(keras.Input((64,)), layers.Dense(256, "relu"), layers.Dense(128, "relu")),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    ema = EMAWeights(decay=0.995)
    model.fit(images[:TRAINED], labels[:TRAINED], 128, epochs=40, verbose=0, callbacks=[ema])
    test = images[TRAINED:], digits[TRAINED:]
    _, averaged = model.evaluate(*test, verbose=0)
    ema.restore()
    _, trained = model.evaluate(*test, verbose=0)
    report(trained, averaged)


if __name__ == "__main__":
    main()
