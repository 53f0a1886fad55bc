"""Finding the bridge of an object, and walking containers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from contextlib import suppress
from functools import cache
from importlib import import_module
from math import prod
from numbers import Complex, Real
from types import ModuleType
from typing import Any, Final

from fastema.bridges.names import named
from fastema.errors import ArgumentError, BridgeError, DTypeError
from fastema.layout.spec import Leaf, Leaves, TensorSpec

__all__ = [
    "bridge_of",
    "describe",
    "dtype_code",
    "leaves_of",
    "materialised",
    "memory_of",
    "scalar",
    "written",
]

_FRAMEWORKS: Final = ("keras", "torch", "tensorflow", "jax", "cupy", "numpy")
"""Import names, which are those of their bridges. Keras comes first: its models are modules of its
backends too."""

_ANY_OTHER: Final = "capsule"
"""The bridge of what speaks DLPack, whoever made it."""


def _loaded() -> Iterator[ModuleType]:
    """Bridges of the frameworks that somebody imported: the others own nothing."""
    for framework in _FRAMEWORKS:
        if framework in sys.modules:
            yield _bridge(framework)
    yield _bridge(_ANY_OTHER)


@cache
def _bridge(name: str) -> ModuleType:
    return import_module(f"fastema.bridges.{name}")


def bridge_of(array: Any) -> ModuleType:
    """The bridge of an array.

    Raises
    ------
    BridgeError
        For an object that belongs to no known framework.
    """
    for bridge in _loaded():
        if bridge.owns(array):
            return bridge
    raise BridgeError(
        f"cannot average {_type_of(array)}; expected an array "
        f"of {', '.join(_FRAMEWORKS)} or anything with __dlpack__, a list, tuple or dict of them, "
        "a JAX pytree, or a module or model of torch, Keras or TensorFlow"
    )


def memory_of(array: Any) -> ModuleType:
    """The bridge of the framework whose arrays hold averages of such an array."""
    bridge = bridge_of(array)
    other = getattr(bridge, "MEMORY", None)
    return bridge if other is None else _bridge(other)


def describe(array: Any) -> TensorSpec:
    """Where an array lies now."""
    spec: TensorSpec = bridge_of(array).describe(array)
    return spec


def written(arrays: Iterable[Any]) -> list[tuple[Callable[[Any], None], list[Any]]]:
    """The arrays by the function to call with them after each write, where there is one."""
    found: dict[Callable[[Any], None], list[Any]] = {}
    for array in arrays:
        tell = getattr(bridge_of(array), "written", None)
        if tell is not None:
            found.setdefault(tell, []).append(array)
    return list(found.items())


def scalar(value: Any) -> float | Callable[[], float]:
    """A number, or a function that reads it later where reading it now would wait for a device.

    Parameters
    ----------
    value : number, or array of one element of any framework

    Raises
    ------
    BridgeError
        For anything else, and for what stands for a number while a function is traced.
    """
    try:
        found = _scalar(value)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, BridgeError):
            raise
        raise BridgeError(f"expected a number, got {_type_of(value)} ({error})") from None
    if found is None:
        raise BridgeError(f"expected a number, got {_type_of(value)}")
    return found


def _scalar(value: Any) -> float | Callable[[], float] | None:
    if isinstance(value, Real):
        return float(value)
    for bridge in _loaded():
        if hasattr(bridge, "scalar") and bridge.owns(value):
            if prod(value.shape) != 1:
                raise BridgeError(
                    f"expected one number, got {_type_of(value)} of shape {tuple(value.shape)}; "
                    "take its mean, or give update_many a series"
                )
            found: float | Callable[[], float] = bridge.scalar(value)
            return found
    if isinstance(value, Complex | str) or not hasattr(type(value), "__float__"):
        return None
    return float(value)  # Decimal, scalars of ml_dtypes


def _type_of(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def dtype_code(value: Any) -> str:
    """The code of a dtype object of any framework.

    Raises
    ------
    ArgumentError
        For an object that is no dtype.
    """
    for bridge in _loaded():
        if hasattr(bridge, "code"):
            with suppress(DTypeError, TypeError):
                code: str = bridge.code(value)
                return code
    raise ArgumentError(f"dtype={value!r}: expected a float dtype, or a name such as 'float32'")


def _flatten(tree: Any, path: str, found: dict[str, Any], held: list[Any]) -> None:
    if isinstance(tree, Mapping):
        entries = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        entries = [(str(i), value) for i, value in enumerate(tree)]
    elif path in found:
        raise BridgeError(f"two entries are called {path!r}; give them distinct names")
    else:
        found[path] = tree
        return
    if not isinstance(tree, tuple):
        held.append(tree)
    for key, value in entries:
        _flatten(value, f"{path}.{key}" if path else key, found, held)


class _Tree:
    """The structure of nested lists, tuples and dicts."""

    def __init__(self, container: Any, names: list[str]) -> None:
        self._names = names
        self._places = _rebuilt(container, iter(range(len(names))))

    def flatten(self, container: Any, *, write: bool = False) -> Sequence[Any] | None:
        found: dict[str, Any] = {}
        _flatten(container, "", found, [])
        return list(found.values()) if list(found) == self._names else None

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        return _rebuilt(self._places, iter(tensors))


def _rebuilt(tree: Any, leaves: Iterator[Any]) -> Any:
    """A tree of the same form with other leaves, taken in turn."""
    if isinstance(tree, Mapping):
        return {key: _rebuilt(value, leaves) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        parts = [_rebuilt(value, leaves) for value in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*parts)
        return tuple(parts) if isinstance(tree, tuple) else parts
    return next(leaves)


def materialised(container: Any) -> Any:
    """A container that can be walked again: ``model.parameters()``, ``d.values()`` as a list."""
    return list(container) if isinstance(container, Iterator | ValuesView) else container


def leaves_of(container: Any) -> Leaves:
    """All tensors of a container, by name.

    Parameters
    ----------
    container : module, model, pytree, array, or lists, tuples and dicts of arrays, nested
        Names are the framework's own for modules, else keys and positions joined by dots.

    Raises
    ------
    BridgeError
        For an object that no bridge knows.
    """
    for bridge in _loaded():
        leaves: Leaves | None = bridge.walk(container)
        if leaves is not None:
            return leaves
    found: dict[str, Any] = {}
    held: list[Any] = []
    _flatten(container, "", found, held)
    items = [Leaf(name, named(name, describe, array)) for name, array in found.items()]
    moving = any(hasattr(bridge_of(array), "finder") for array in found.values())
    return Leaves(items, describe, held, structure=_Tree(container, list(found)), moving=moving)
