"""Keras 3 models and variables, on any of its backends.

The backend's own array is described. On PyTorch and TensorFlow that is a tensor or variable of its
own for as long as the Keras variable lives; on other backends a variable is given another array
whenever it changes, and is written by giving it one.
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

from fastema.bridges.moving import Finder, Found, finder_of, moves
from fastema.bridges.names import named
from fastema.bridges.registry import bridge_of
from fastema.bridges.registry import describe as describe_any
from fastema.errors import BridgeError
from fastema.layout.spec import Attributes, Leaf, Leaves, Role, TensorContainer, TensorSpec

MEMORY: Final = "numpy"
"""The framework whose arrays hold averages of variables that are given new arrays."""

_KEEPS_ITS_ARRAY: Final = {"torch", "tensorflow"}
"""Backends whose variables hold one object of the backend for good."""


def owns(obj: Any) -> bool:
    """Return whether an object is a variable of Keras 3."""
    return isinstance(obj, keras.Variable)


def value(variable: Any) -> Any:
    """Return the backend's array in a variable; a BridgeError if there is none now."""
    if variable._value is None:  # its public value would be a new initial one
        raise BridgeError(
            f"{variable.path}: the variable holds no value now: the model is not built, or its "
            "values are with a running fit or evaluate"
        )
    return variable._value


def describe(variable: Any) -> TensorSpec:
    """Describe where a variable's array lies now."""
    return _described(variable, value(variable))


def _described(variable: Any, array: Any) -> TensorSpec:
    found = describe_any(array)
    if keras.backend.backend() in _KEEPS_ITS_ARRAY:
        return found
    return replace(found, writable=False, owner=variable)


def assign(variable: Any, array: Any) -> None:
    """Give a variable another array of the backend."""
    variable.assign(array)


def to_framework(memory: NDArray[Any]) -> Any:
    """Make an array of the backend with a copy of NumPy memory."""
    made = _made_by_backend()
    return memory.copy() if made is None else made(memory)


@cache
def _made_by_backend() -> Any:
    return getattr(bridge_of(keras.ops.zeros(())), "to_framework", None)


def finder(specs: Sequence[TensorSpec], variables: Sequence[Any]) -> Finder:
    """Return a finder of variables like these."""
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
        raise BridgeError("cannot make a new Keras model: use swapped(), or copy_to(other_model)")


def _with_the_trainer(model: Any) -> dict[int, Any]:
    """Return the arrays of variables, by ``id``, that a running fit on JAX holds for them."""
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
"""Attributes of a layer: the lists through which it holds its variables."""


def _held(layer: Any) -> list[TensorContainer]:
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
    """Return the weights of a layer or model by their paths within it; None for anything else.

    It must be built. Weights that were not made to be trained, such as the statistics of batch
    normalisation, are buffers.
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
        Leaf(name, named(name, partial(_described, one), array), _role(one, to_train))
        for name, one, array in zip(names, variables, arrays, strict=True)
    ]
    moving = any(moves(array) for array in arrays)
    held = [] if moving else [part for layer in layers for part in _held(layer)]
    return Leaves(items, describe_any, held, structure=structure, moving=moving)


def _names(layer: Any, paths: Sequence[str]) -> list[str]:
    """Return paths as they are in the first model of its kind that a process makes.

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
    """Return the name that Keras makes of a class: ``conv2d_transpose`` of ``Conv2DTranspose``."""
    words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
