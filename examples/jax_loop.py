"""JAX: arrays never change, so pass the new arrays to each update, outside of jit.

Inside jit, use optax.incremental_update: XLA fuses it with the training step.

    pip install fastema jax torch scikit-learn
    python examples/jax_loop.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from digits import TRAINED, load, report

import fastema

Parameters = list[tuple[jax.Array, jax.Array]]


def network(parameters: Parameters, x: jax.Array) -> jax.Array:
    for weight, bias in parameters[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = parameters[-1]
    return x @ weight + bias


def loss(parameters: Parameters, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = jax.nn.log_softmax(network(parameters, x))
    return -jnp.take_along_axis(logits, y[:, None], 1).mean()


@jax.jit
def step(parameters: Parameters, x: jax.Array, y: jax.Array) -> Parameters:
    gradients = jax.grad(loss)(parameters, x, y)
    return jax.tree.map(lambda p, g: p - 0.3 * g, parameters, gradients)


def main() -> None:
    images, digits, labels = (jnp.asarray(one.numpy()) for one in load())
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = ((64, 256), (256, 128), (128, 10))
    parameters: Any = [
        (jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5, jnp.zeros(shape[1]))
        for key, shape in zip(keys, sizes, strict=False)
    ]
    ema = fastema.EMA(parameters, decay=0.998)
    for key in jax.random.split(keys[-1], 1500):
        batch = jax.random.randint(key, (128,), 0, TRAINED)
        parameters = step(parameters, images[batch], labels[batch])
        ema.update(parameters)

    def accuracy(parameters: Any) -> float:
        right = network(parameters, images[TRAINED:]).argmax(1) == digits[TRAINED:]
        return float(right.mean())

    report(accuracy(parameters), accuracy(ema.averaged()))


if __name__ == "__main__":
    main()
