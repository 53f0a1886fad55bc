"""Keras 3 models and variables, on any of its backends.

What is described is the backend's own array. On PyTorch and TensorFlow that is a tensor or variable
of its own for as long as the Keras variable lives; on other backends a variable is given another
array whenever it changes, and is written by giving it one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from operator import is_
from typing import Any, Final

import keras
from numpy.typing import NDArray

from fastema.bridges.moving import Finder, Found, finder_of, moves
from fastema.bridges.names import named
from fastema.bridges.registry import bridge_of
from fastema.bridges.registry import describe as describe_any
from fastema.errors import BridgeError
from fastema.layout.spec import Attributes, Held, Leaf, Leaves, Role, TensorSpec

__all__ = ["MEMORY", "assign", "describe", "finder", "owns", "shown", "value", "walk"]

MEMORY: Final = "numpy"
"""The framework whose arrays hold averages of variables that are given new arrays."""

_KEEPS_ITS_ARRAY: Final = {"torch", "tensorflow"}
"""Backends whose variables hold one object of the backend for good."""


def owns(obj: Any) -> bool:
    """Whether a variable of Keras 3."""
    return isinstance(obj, keras.Variable)


def value(variable: Any) -> Any:
    """The backend's array in a variable.

    Raises
    ------
    BridgeError
        If there is none yet, or none for the moment.
    """
    if variable._value is None:  # its public value would be a new initial one
        raise BridgeError(
            f"{variable.path}: the variable holds no value now: the model is not built, or its "
            "values are with a running fit or evaluate"
        )
    return variable._value


def _keeps_its_array() -> bool:
    return keras.backend.backend() in _KEEPS_ITS_ARRAY


def describe(variable: Any) -> TensorSpec:
    """Where a variable's array lies now.

    Raises
    ------
    BridgeError, DTypeError
        As the backend's bridge does.
    """
    return _described(variable, value(variable))


def _described(variable: Any, array: Any) -> TensorSpec:
    found = describe_any(array)
    if _keeps_its_array():
        return found
    return replace(found, writable=False, owner=variable)


def assign(variable: Any, array: Any) -> None:
    """Give a variable another array of the backend."""
    variable.assign(array)


def shown(memory: NDArray[Any]) -> Any:
    """The backend's array with a copy of NumPy memory."""
    made = _made_by_backend()
    return memory.copy() if made is None else made(memory)


@cache
def _made_by_backend() -> Any:
    return getattr(bridge_of(keras.ops.zeros(())), "shown", None)


def finder(specs: Sequence[TensorSpec], variables: Sequence[Any]) -> Finder:
    """What finds variables like these again."""
    find = finder_of(specs, [value(one) for one in variables])

    def look(variables: Sequence[Any], write: bool) -> Found | None:
        return find([value(one) for one in variables], write)

    return look


class _Model:
    """The structure of a layer or model: its weights in its own order."""

    def __init__(self, variables: Sequence[Any], names: Sequence[str]) -> None:
        self._variables, self._names = variables, names
        self._trained = [one.trainable for one in variables]

    def flatten(self, container: Any, *, write: bool = False) -> Sequence[Any] | None:
        if not isinstance(container, keras.layers.Layer):
            return None
        if write and hasattr(container, "jax_state_sync"):
            container.jax_state_sync()
        variables = container.weights
        if not self._fits(container, variables):
            return None
        away = _with_the_trainer(container)
        return [away[id(one)] if id(one) in away else value(one) for one in variables]

    def _fits(self, container: Any, variables: Sequence[Any]) -> bool:
        if [one.trainable for one in variables] != self._trained:
            return False
        if not all(map(is_, variables, self._variables)):
            if _names(container, [one.path for one in variables]) != self._names:
                return False
            self._variables = variables
        return True

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        raise BridgeError("a Keras model is not made anew: use swapped(), or copy_to(other_model)")


def _with_the_trainer(model: Any) -> dict[int, Any]:
    """Arrays of variables, by their identity, while a running fit on JAX keeps them from them."""
    state = getattr(model, "_jax_state", None)
    if not state or model._jax_state_synced:
        return {}
    found: dict[int, Any] = {}
    for kind in ("trainable_variables", "non_trainable_variables"):
        arrays = state.get(kind)
        if arrays:
            found.update(zip(map(id, getattr(model, kind)), arrays, strict=True))
    return found


def _layers(layer: Any) -> Iterator[Any]:
    yield from layer._flatten_layers(include_self=True, recursive=True)


_PARTS: Final = ("_layers", "_trainable_variables", "_non_trainable_variables")
"""Attributes of a layer: the lists through which it holds its variables."""


def _held(layer: Any) -> Iterator[Held]:
    yield Held(Attributes(layer), tuple(name for name in _PARTS if name in vars(layer)))
    yield from (Held(getattr(layer, name)) for name in _PARTS)


def _roles(layer: Any) -> Iterator[tuple[Any, Role]]:
    made_to_train = {id(one) for part in _layers(layer) for one in part._trainable_variables}
    for one in layer.weights:
        if id(one) not in made_to_train:
            yield one, "buffer"
        else:
            yield one, "weight" if one.trainable else "frozen"


def walk(container: Any) -> Leaves | None:
    """The weights of a layer or model by their paths within it; None for anything else.

    What was not made to be trained, such as the statistics of batch normalisation, is a buffer.

    Raises
    ------
    BridgeError
        If it is not built yet.
    """
    if not isinstance(container, keras.layers.Layer):
        return None
    found = list(_roles(container))
    if not found and not container.built:
        raise BridgeError(
            f"the {type(container).__name__} {container.name!r} is not built: it has no weights "
            "before it has seen an input; call build() or run it once"
        )
    names = _names(container, [one.path for one, _ in found])
    structure = _Model([one for one, _ in found], names)
    arrays = structure.flatten(container)
    assert arrays is not None
    items = [
        Leaf(name, named(name, partial(_described, one), array), role)
        for name, (one, role), array in zip(names, found, arrays, strict=True)
    ]
    moving = any(moves(array) for array in arrays)
    held = [] if moving else [part for one in _layers(container) for part in _held(one)]
    return Leaves(items, describe_any, held, structure=structure, moving=moving)


def _names(layer: Any, paths: Sequence[str]) -> list[str]:
    """Paths as they are in the first model of its kind that a process makes.

    Keras numbers the layers that nobody named through all models of a process: here they are
    numbered within the model, so that an average fits the model that is built again.
    """
    kinds = {one.name: _snake(type(one).__name__) for one in _layers(layer)}
    paths = [path.removeprefix(f"{layer.name}/") for path in paths]
    known: dict[str, str] = {}
    counts: dict[str, int] = {}

    def numbered(base: str) -> str:
        count = counts[base] = counts.get(base, -1) + 1
        return f"{base}_{count}" if count else base

    names = []
    for path in paths:
        inner, made = "", ""
        for part in path.split("/")[:-1]:
            inner = f"{inner}{part}/"
            if inner not in known:
                kind = kinds.get(part)
                automatic = kind is not None and re.fullmatch(rf"{kind}(_\d+)?", part)
                known[inner] = f"{numbered(made + str(kind)) if automatic else made + part}/"
            made = known[inner]
        names.append(made + path.rpartition("/")[2])
    used: dict[str, int] = {}
    for place, name in enumerate(names):
        used[name] = used.get(name, 0) + 1
        names[place] = name if used[name] == 1 else f"{name}:{used[name]}"
    return names


def _snake(name: str) -> str:
    """The name that Keras makes of a class: ``Conv2DTranspose`` to ``conv2d_transpose``."""
    words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
