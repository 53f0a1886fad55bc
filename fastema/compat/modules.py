"""Averages in modules, or in tensors by name, that their owner may replace at any time."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from fastema.bridges.registry import leaves_of
from fastema.compat.averager import ModelAverager, copy_model
from fastema.layout.spec import Role

__all__ = ["ModuleAverager", "NamedAverager", "copy_frozen"]

Buffers: TypeAlias = Literal["saved", "copy"]


def copy_frozen(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a model whose parameters require no gradient."""
    found = copy_model(model, memo)
    for parameter in found.parameters():  # a scripted module cannot do it for all
        parameter.requires_grad_(False)
    return found


def _persistence(module: nn.Module) -> dict[str, bool]:
    """Return, by name, whether each tensor is part of the module's state dict."""
    leaves = leaves_of(module)
    named = {one.name: one.persistent for one in leaves.items}
    return {**named, **{one.name: one.persistent for one in leaves.opaque}}


class _BufferPolicy:
    """Policy that averages parameters, and copies all buffers or averages the saved ones."""

    def __init__(self, averaged: nn.Module, buffers: Buffers, left_out: str) -> None:
        self._averaged, self._buffers, self._left_out = averaged, buffers, left_out
        self._saved: dict[str, bool] = {}
        self.model: weakref.ref[nn.Module] | None = None

    def __call__(self, name: str, role: Role) -> Literal["average", "copy", "skip"]:
        if self._left_out and name.startswith(self._left_out):
            return "skip"
        if role != "buffer":
            return "average"
        if self._buffers == "copy":
            return "copy"
        if name not in self._saved:
            model = None if self.model is None else self.model()
            theirs = {} if model is None else _persistence(model)
            self._saved = {**theirs, **_persistence(self._averaged)}
        return "average" if self._saved.get(name) else "skip"


class ModuleAverager:
    """Updates an averaged module from a model, with settings that may change between steps.

    Tensors whose names begin with ``left_out`` have no average.
    """

    def __init__(self, left_out: str = "") -> None:
        self._left_out = left_out
        self._current: tuple[nn.Module, dict[str, Any], _BufferPolicy, ModelAverager] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy it without its averager: a copy locates its tensors for itself."""
        return type(self), (self._left_out,)

    def of(
        self,
        averaged: nn.Module,
        model: nn.Module | None = None,
        *,
        buffers: Buffers = "saved",
        **rounding: Any,
    ) -> ModelAverager:
        """Return the averager of a module; ``rounding`` are options of :class:`ModelAverager`.

        ``buffers="saved"`` averages the buffers in a state dict and skips all others; ``"copy"``
        copies all buffers. With ``model``, a saved buffer that only the model has is an error.
        """
        settings = {"buffers": buffers, **rounding}
        if (
            self._current is None
            or self._current[0] is not averaged
            or self._current[1] != settings
        ):
            policy = _BufferPolicy(averaged, buffers, self._left_out)
            self._current = averaged, settings, policy, ModelAverager(averaged, policy, **rounding)
        *_, policy, averager = self._current
        policy.model = None if model is None else weakref.ref(model)
        return averager


def _trained_or_named(names: frozenset[str], name: str, role: Role) -> Literal["average", "skip"]:
    return "average" if role == "weight" or name in names else "skip"


class NamedAverager:
    """Updates averages by name from a model: the given names, and all trained parameters.

    A trained parameter without an average is an error; other tensors may lack one.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._averages: dict[str, Tensor] = {}
        self._averager = ModelAverager(self._averages, partial(_trained_or_named, self._names))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy it without its averages: a copy locates its tensors for itself."""
        return type(self), (self._names,)

    def of(self, averages: Mapping[str, Tensor]) -> ModelAverager:
        """Return the averager of these averages, which may be other tensors at each call."""
        self._averages.update(averages)
        return self._averager

    def forget(self) -> None:
        """Drop all references to averages."""
        self._averages.clear()
        self._averager.forget()
