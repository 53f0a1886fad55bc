"""The average in a model for a while, and the weights back."""

from __future__ import annotations

import zlib
from copy import deepcopy
from typing import Any

import keras

from fastema.bridges.memory import bytes_of, row_major_on_host
from fastema.bridges.registry import leaves_of
from fastema.shadow import EMA

__all__ = ["Copies", "Swap", "Watched"]


class Swap:
    """Average and weights change places: exact, and without a third copy."""

    def __init__(self, model: Any, ema: EMA, which: int | None) -> None:
        self._ema, self._which = ema, which

    def put(self) -> None:
        """Put the average into the model."""
        self._ema.apply_shadow(which=self._which)

    def back(self) -> None:
        """Give the model its weights back."""
        if self._ema.applied:
            self._ema.restore()


class Copies:
    """The average is copied into the model, and the weights are kept beside.

    For the JAX backend, whose arrays are never written: the weights are kept by reference. An
    evaluation that fails there leaves variables without a value, or arrays that were donated; what
    is kept here is neither.
    """

    def __init__(self, model: Any, ema: EMA, which: int | None) -> None:
        self._model, self._ema, self._which = model, ema, which
        self._averaged: list[tuple[Any, Any]] = []
        self._others: list[tuple[Any, Any]] = []

    def put(self) -> None:
        """Put the average into the model."""
        if keras.backend.backend() == "jax":
            self._model.jax_state_sync()
        names = self._ema.shadows[0].keys()
        leaves = zip(self._model.weights, leaves_of(self._model).items, strict=True)
        weights = {id(variable): leaf.name in names for variable, leaf in leaves}
        for variable in self._model.variables:
            if weights.get(id(variable)):
                self._averaged.append((variable, self._keep(variable)))
            else:
                # What is no weight, such as the state of random numbers, is small: a copy of it.
                kept = variable.value if id(variable) in weights else _copied(variable)
                self._others.append((variable, kept))
        self._ema.copy_to(self._model, which=self._which)

    @staticmethod
    def _keep(variable: Any) -> Any:
        return variable.value

    def back(self) -> None:
        """Give the model its weights back."""
        self._model.jax_state_sync()  # what an evaluation left that failed, if it came so far
        for variable, value in self._averaged:
            variable.assign(value)
        for variable, value in self._others:
            if _is_gone(variable._value) and not _is_gone(value):
                variable.assign(value)


class Watched(Copies):
    """The same where other callbacks may write weights meanwhile: what they wrote stays."""

    def put(self) -> None:
        """Put the average into the model."""
        super().put()
        self._sums = [_checksum(variable) for variable, _ in self._averaged]

    @staticmethod
    def _keep(variable: Any) -> Any:
        if keras.backend.backend() == "jax":
            return variable.value
        return _copied(variable)

    def back(self) -> None:
        """Give the model its weights back, but for those that others wrote."""
        for (variable, value), before in zip(self._averaged, self._sums, strict=True):
            if _checksum(variable) == before:
                variable.assign(value)


def _on_host(variable: Any) -> Any:
    """A variable's value in row-major memory of the host: perhaps its own."""
    value = variable.value
    # Of PyTorch it stays a tensor: NumPy has no bfloat16 that both know.
    return row_major_on_host(
        value if hasattr(value, "detach") else keras.ops.convert_to_numpy(value)
    )


def _copied(variable: Any) -> Any:
    return deepcopy(_on_host(variable))


def _is_gone(array: Any) -> bool:
    """Whether a variable has no value, or one that was donated."""
    return array is None or (hasattr(array, "is_deleted") and array.is_deleted())


def _checksum(variable: Any) -> int:
    array = _on_host(variable)
    return zlib.crc32(bytes_of(array))
