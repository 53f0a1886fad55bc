"""Finding the bridge of an object, and walking containers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, Final

from fastema.errors import BridgeError
from fastema.layout.spec import Leaf, Leaves, TensorSpec

__all__ = ["bridge_of", "describe", "leaves_of", "materialised", "written"]

_BRIDGES: Final = {"torch": "fastema.bridges.torch", "numpy": "fastema.bridges.numpy"}
"""Framework's import name to its bridge. A framework nobody imported owns nothing."""


def _loaded() -> Iterator[ModuleType]:
    for framework, bridge in _BRIDGES.items():
        if framework in sys.modules:
            yield import_module(bridge)


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
        f"cannot average a {type(array).__module__}.{type(array).__qualname__}; expected an array "
        f"of {', '.join(_BRIDGES)}, a list, tuple or dict of them, or a torch module"
    )


def describe(array: Any) -> TensorSpec:
    """Where an array lies now."""
    spec: TensorSpec = bridge_of(array).describe(array)
    return spec


def written(arrays: Iterable[Any]) -> list[tuple[Callable[[Any], None], list[Any]]]:
    """The arrays by the function to call with them after each write."""
    found: dict[Callable[[Any], None], list[Any]] = {}
    for array in arrays:
        found.setdefault(bridge_of(array).written, []).append(array)
    return list(found.items())


def _flatten(tree: Any, path: str, found: dict[str, Any], held: list[dict[str, Any]]) -> None:
    if isinstance(tree, Mapping):
        entries = [(str(key), value) for key, value in tree.items()]
        if isinstance(tree, dict):
            held.append(tree)
    elif isinstance(tree, list | tuple):
        entries = [(str(i), value) for i, value in enumerate(tree)]
    elif path in found:
        raise BridgeError(f"two entries are called {path!r}; give them distinct names")
    else:
        bridge_of(tree)
        found[path] = tree
        return
    for key, value in entries:
        _flatten(value, f"{path}.{key}" if path else key, found, held)


def materialised(container: Any) -> Any:
    """A container that can be walked again: an iterator (``model.parameters()``) as a list."""
    return list(container) if isinstance(container, Iterator) else container


def leaves_of(container: Any) -> Leaves:
    """All tensors of a container, by name.

    Parameters
    ----------
    container : module, array, or lists, tuples and dicts of arrays, nested
        Names are the framework's own for modules, else keys and positions joined by dots. A list
        is taken as it is now: tensors appended later are not seen, while a dict's entries are
        looked up again at every check.

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
    held: list[dict[str, Any]] = []
    _flatten(container, "", found, held)
    items = [Leaf(name, describe(array)) for name, array in found.items()]
    exchanges = {bridge_of(array).exchange(array) for array in found.values()}
    return Leaves(
        items,
        describe,
        exchange=exchanges.pop() if len(exchanges) == 1 else 0,
        dicts=held,
    )
