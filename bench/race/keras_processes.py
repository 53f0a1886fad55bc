"""Helpers of the Keras questions: one process per backend, a network, and an epoch timer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from bench.race.processes import call_in_subprocess
from bench.race.question import Settings
from bench.race.report import Row

BACKENDS = {"tensorflow": "TensorFlow", "torch": "PyTorch", "jax": "JAX"}
PACKAGES = ("numpy", "numba", "keras", "torch", "tensorflow-cpu", "tensorflow", "jax")
BATCH = 32


def backends(settings: Settings) -> list[str]:
    """Return the backends that ``--case`` can select."""
    return list(BACKENDS)


def measure_backends(
    measure: Callable[[bool], list[dict[str, Any]]], settings: Settings
) -> Iterator[Row]:
    """Yield the rows of each backend, each measured in its own process.

    Keras chooses its backend on import and cannot change it afterwards.

    Parameters
    ----------
    measure
        Called in a fresh process with `settings.quick`; returns rows as dicts.
    settings
        Settings of the run.
    """
    for backend, name in BACKENDS.items():
        if settings.wants(backend):
            quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": backend}
            for row in call_in_subprocess(measure, settings.quick, environment=quiet):
                yield replace(Row(**row), column=name)


def build_perceptron() -> Any:
    """Return a perceptron with a million weights in 6 tensors."""
    import keras

    dense = keras.layers.Dense
    layers = [dense(800, "relu"), dense(480, "relu"), dense(10)]
    return keras.Sequential([keras.Input((784,)), *layers], name="net")


def make_epoch_timer() -> Any:
    """Return a callback that times epochs, without the work of fit() before and after them."""
    import keras

    class Clock(keras.callbacks.Callback):  # type: ignore[misc]
        """An epoch timer without batch hooks, which would end asynchronous dispatch on JAX."""

        seconds = 0.0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._began = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            for variable in self.model.trainable_variables:  # wait for pending work
                if hasattr(variable.value, "block_until_ready"):
                    variable.value.block_until_ready()
            self.seconds = time.perf_counter() - self._began

    return Clock()
