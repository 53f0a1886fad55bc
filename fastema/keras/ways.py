"""Ways to put averages into a Keras model whose memory cannot be swapped with theirs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import keras

from fastema.bridges.memory import bytes_of, row_major_on_host

__all__ = ["CopyingSwap", "WriteAwareSwap", "is_gone"]


class CopyingSwap:
    """Copies averages into the model, and keeps the model's own values to restore them.

    On JAX, arrays are immutable, so that weights are kept by reference. An evaluation that fails on
    JAX leaves variables without a value, or with donated arrays, but does not affect the values
    kept here. ``copy_averages`` copies the averages into the model.
    """

    def __init__(
        self, model: Any, averaged: Iterable[Any], copy_averages: Callable[[], object]
    ) -> None:
        self._model, self._variables, self._copy_averages = model, list(averaged), copy_averages
        self._raw_values: list[tuple[Any, Any]] = []
        self._other_values: list[tuple[Any, Any]] = []

    def apply(self) -> None:
        """Keep the model's values, and copy the averages into the model."""
        self._sync()
        averaged = {id(one) for one in self._variables}
        others = [one for one in self._model.variables if id(one) not in averaged]
        self._raw_values = [(one, self._keep_value(one)) for one in self._variables]
        self._other_values = self._keep_others(others)
        self._copy_averages()

    def _sync(self) -> None:
        if keras.backend.backend() == "jax":
            self._model.jax_state_sync()  # also the state that a failed evaluation left

    @staticmethod
    def _keep_value(variable: Any) -> Any:
        return variable.value

    def _keep_others(self, others: list[Any]) -> list[tuple[Any, Any]]:
        weights = {id(one) for one in self._model.weights}
        # Copy variables other than weights, such as random number states, which are small.
        return [(one, one.value if id(one) in weights else copy_to_host(one)) for one in others]

    def restore(self) -> None:
        """Restore the model's own values."""
        self._sync()
        for variable, value in self._raw_values:
            if not self._was_written(variable):
                variable.assign(value)
        for variable, value in self._other_values:
            if is_gone(variable._value) and not is_gone(value):
                variable.assign(value)

    def _was_written(self, variable: Any) -> bool:
        return False


class WriteAwareSwap(CopyingSwap):
    """A :class:`CopyingSwap` that keeps weights which other callbacks wrote meanwhile."""

    def apply(self) -> None:
        """Keep the model's values, copy the averages into it, and record their checksums."""
        super().apply()
        self._checksums = {id(one): _checksum(one) for one in self._variables}

    @staticmethod
    def _keep_value(variable: Any) -> Any:
        return variable.value if keras.backend.backend() == "jax" else copy_to_host(variable)

    def _was_written(self, variable: Any) -> bool:
        gone = is_gone(variable._value)
        return not gone and _checksum(variable) != self._checksums[id(variable)]


def _to_host(variable: Any) -> Any:
    """Return a variable's value in row-major host memory, possibly the variable's own."""
    value = variable.value
    if hasattr(value, "detach"):
        return row_major_on_host(value)  # NumPy and PyTorch have no common bfloat16
    # Keras's own conversion of TensorFlow's variables makes NumPy warn.
    array = value.numpy() if hasattr(value, "numpy") else keras.ops.convert_to_numpy(value)
    return row_major_on_host(array)


def copy_to_host(variable: Any) -> Any:
    """Return a copy of a variable's value on the host."""
    return deepcopy(_to_host(variable))


def is_gone(array: Any) -> bool:
    """Return whether a variable's array is missing or was donated."""
    return array is None or (hasattr(array, "is_deleted") and array.is_deleted())


def _checksum(variable: Any) -> int:
    return zlib.crc32(bytes_of(_to_host(variable)))
