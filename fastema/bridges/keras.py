"""The bridge to Keras 3 models and variables, on any backend.

A variable is described by its backend array. On PyTorch and TensorFlow it has one tensor or
variable for its lifetime. On other backends it gets a new array whenever it changes, and is written
by assigning one.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from operator import is_
from typing import Any, Final

import keras
from numpy.typing import NDArray

from fastema.bridges.moving import Finder, FoundArrays, finder_of, has_moving_arrays
from fastema.bridges.names import describe_named
from fastema.bridges.registry import bridge_of
from fastema.bridges.registry import describe as describe_any
from fastema.errors import BridgeError
from fastema.layout.spec import Attributes, Leaf, Leaves, Role, TensorContainer, TensorSpec

MEMORY: Final = "numpy"
"""The bridge whose arrays hold averages of variables that get new arrays."""

_KEEPS_ITS_ARRAY: Final = {"torch", "tensorflow"}
"""Backends on which a variable holds the same array object for its lifetime."""


def owns(obj: Any) -> bool:
    """Return whether an object is a Keras 3 variable."""
    return isinstance(obj, keras.Variable)


def value(variable: Any) -> Any:
    """Return a variable's backend array; raise a BridgeError if it holds none at present."""
    if variable._value is None:  # the public attribute would initialize a new one
        raise BridgeError(
            f"{variable.path}: the variable holds no value now: the model is not built, or a "
            "running fit or evaluate holds its value"
        )
    return variable._value


def describe(variable: Any) -> TensorSpec:
    """Return the TensorSpec of a variable's current array."""
    return _describe_array(variable, value(variable))


def _describe_array(variable: Any, array: Any) -> TensorSpec:
    found = describe_any(array)
    if keras.backend.backend() in _KEEPS_ITS_ARRAY:
        return found
    return replace(found, writable=False, owner=variable)


def assign(variable: Any, array: Any) -> None:
    """Assign another backend array to a variable."""
    variable.assign(array)


def to_framework(memory: NDArray[Any]) -> Any:
    """Return a copy of a NumPy array, converted if the backend's bridge has a conversion."""
    made = _backend_converter()
    return memory.copy() if made is None else made(memory)


@cache
def _backend_converter() -> Any:
    return getattr(bridge_of(keras.ops.zeros(())), "to_framework", None)


def finder(specs: Sequence[TensorSpec], variables: Sequence[Any]) -> Finder:
    """Return a finder for variables like these; see :mod:`fastema.bridges.moving`."""
    find = finder_of(specs, [value(one) for one in variables])

    def look(variables: Sequence[Any], write: bool) -> FoundArrays | None:
        return find([value(one) for one in variables], write)

    return look


class _Model:
    """Structure of a layer or model: its weights in Keras's order."""

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
        away = _arrays_held_by_fit(container)
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
        raise BridgeError("cannot make a new Keras model: use swapped(), or copy_to(other_model)")


def _arrays_held_by_fit(model: Any) -> dict[int, Any]:
    """Return ``{id(variable): array}`` for the arrays that a running fit on JAX holds."""
    state = getattr(model, "_jax_state", None)
    if not state or model._jax_state_synced:
        return {}
    found: dict[int, Any] = {}
    for kind in ("trainable_variables", "non_trainable_variables"):
        arrays = state.get(kind)
        if arrays:
            found.update(zip(map(id, getattr(model, kind)), arrays, strict=True))
    return found


def _layers(layer: Any) -> Iterable[Any]:
    found: Iterable[Any] = layer._flatten_layers(include_self=True, recursive=True)
    return found


_PARTS: Final = ("_layers", "_trainable_variables", "_non_trainable_variables")
"""Attributes of a layer with the lists that hold its variables and sublayers."""


def _containers_of(layer: Any) -> list[TensorContainer]:
    own = tuple(name for name in _PARTS if name in vars(layer))
    return [
        TensorContainer(Attributes(layer), own),
        *(TensorContainer(getattr(layer, name)) for name in _PARTS),
    ]


def _role(variable: Any, made_to_train: Container[int]) -> Role:
    if id(variable) not in made_to_train:
        return "buffer"
    return "weight" if variable.trainable else "frozen"


def walk(container: Any) -> Leaves | None:
    """Return the weights of a layer or model under their paths; None for anything else.

    Raises a BridgeError for a layer that is not built. Weights that are never trained, such as the
    statistics of batch normalization, are buffers.
    """
    if not isinstance(container, keras.layers.Layer):
        return None
    variables = container.weights
    if not variables and not container.built:
        raise BridgeError(
            f"the {type(container).__name__} {container.name!r} is not built: it has no weights "
            "before it has seen an input; call build() or run it once"
        )
    layers = list(_layers(container))
    to_train = {id(one) for layer in layers for one in layer._trainable_variables}
    names = _names(container, [one.path for one in variables])
    structure = _Model(variables, names)
    arrays = structure.flatten(container)
    assert arrays is not None
    items = [
        Leaf(name, describe_named(name, partial(_describe_array, one), array), _role(one, to_train))
        for name, one, array in zip(names, variables, arrays, strict=True)
    ]
    moving = any(has_moving_arrays(array) for array in arrays)
    held = [] if moving else [part for layer in layers for part in _containers_of(layer)]
    return Leaves(items, describe_any, held, structure=structure, moving=moving)


def _names(layer: Any, paths: Sequence[str]) -> list[str]:
    """Return weight paths that stay the same when the model is built again.

    Keras numbers unnamed layers through all models of a process. Here they are numbered within the
    model, so that an average fits a model that was built again.
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
    """Return Keras's snake-case name of a class: ``conv2d_transpose`` for ``Conv2DTranspose``."""
    words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
