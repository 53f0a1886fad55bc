"""Ways to put averages into a Keras model where memory cannot just change places."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import keras

from fastema.bridges.memory import bytes_of, row_major_on_host

__all__ = ["Aside", "UnlessWritten", "is_gone"]


class Aside:
    """The model is given averages, and its own values are kept aside.

    For the JAX backend, whose arrays are never written: weights are kept by reference. An
    evaluation that fails there leaves variables without a value, or arrays that were donated; what
    is kept here is neither.
    ``give`` gives the averages to the model.
    """

    def __init__(self, model: Any, averaged: Iterable[Any], give: Callable[[], object]) -> None:
        self._model, self._variables, self._give = model, list(averaged), give
        self._raw: list[tuple[Any, Any]] = []
        self._others: list[tuple[Any, Any]] = []

    def apply(self) -> None:
        """Keep the model's values, and give it the averages."""
        self._sync()
        averaged = {id(one) for one in self._variables}
        others = [one for one in self._model.variables if id(one) not in averaged]
        self._raw = [(one, self._kept(one)) for one in self._variables]
        self._others = self._kept_beside(others)
        self._give()

    def _sync(self) -> None:
        if keras.backend.backend() == "jax":
            self._model.jax_state_sync()  # also what an evaluation left that failed

    @staticmethod
    def _kept(variable: Any) -> Any:
        return variable.value

    def _kept_beside(self, others: list[Any]) -> list[tuple[Any, Any]]:
        weights = {id(one) for one in self._model.weights}
        # What is no weight, such as the state of random numbers, is small: a copy of it.
        return [(one, one.value if id(one) in weights else copied(one)) for one in others]

    def restore(self) -> None:
        """Give the model its own values."""
        self._sync()
        for variable, value in self._raw:
            variable.assign(value)
        for variable, value in self._others:
            if is_gone(variable._value) and not is_gone(value):
                variable.assign(value)


class UnlessWritten(Aside):
    """The same where other callbacks may write weights meanwhile: what they wrote stays."""

    def apply(self) -> None:
        """Also note what the model was given."""
        super().apply()
        self._sums = [_checksum(variable) for variable in self._variables]

    @staticmethod
    def _kept(variable: Any) -> Any:
        return variable.value if keras.backend.backend() == "jax" else copied(variable)

    def restore(self) -> None:
        """Give the model its own values, but for those that others wrote."""
        for (variable, value), before in zip(self._raw, self._sums, strict=True):
            if _checksum(variable) == before:
                variable.assign(value)


def _on_host(variable: Any) -> Any:
    """Return a variable's value in row-major memory of the host: perhaps its own."""
    value = variable.value
    # Of PyTorch it stays a tensor: NumPy has no bfloat16 that both know.
    return row_major_on_host(
        value if hasattr(value, "detach") else keras.ops.convert_to_numpy(value)
    )


def copied(variable: Any) -> Any:
    """Copy a variable's value to the host."""
    return deepcopy(_on_host(variable))


def is_gone(array: Any) -> bool:
    """Return whether a variable has no value, or one that was donated."""
    return array is None or (hasattr(array, "is_deleted") and array.is_deleted())


def _checksum(variable: Any) -> int:
    return zlib.crc32(bytes_of(_on_host(variable)))
