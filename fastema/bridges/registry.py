"""Finding the bridge of an object, and walking containers."""

from __future__ import annotations

import sys
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    ValuesView,
)
from contextlib import suppress
from functools import cache
from importlib import import_module
from math import prod
from numbers import Complex, Real
from types import FunctionType, MethodType, ModuleType
from typing import Any, Final, Protocol

from fastema.bridges.names import named
from fastema.errors import ArgumentError, BridgeError, DTypeError
from fastema.layout.spec import Held, Leaf, Leaves, Ranks, TensorSpec

__all__ = [
    "Versions",
    "bridge_of",
    "describe",
    "dtype_code",
    "fitted",
    "is_divided",
    "leaves_of",
    "materialised",
    "memory_by",
    "memory_of",
    "part_of",
    "ranks_of",
    "reshard",
    "scalar",
    "state_of",
    "versions_of",
    "written",
]

_FRAMEWORKS: Final = ("keras", "torch", "tensorflow", "jax", "cupy", "numpy")
"""Import names, which are those of their bridges. Keras comes first: its models are modules of its
backends too."""

_DEEPEST: Final = 200
"""Containers in each other: far below where Python's own limit on recursion could be met."""

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


_owners: Final[dict[type[Any], ModuleType]] = {}
"""The bridges that were found, by the type of what they own; no type has two owners."""


def bridge_of(array: Any) -> ModuleType:
    """The bridge of an array.

    Raises
    ------
    BridgeError
        For an object that belongs to no known framework.
    """
    known = _owners.get(type(array))
    if known is not None and known.owns(array):
        return known
    for bridge in _loaded():
        if bridge.owns(array):
            _owners[type(array)] = bridge
            return bridge
    raise BridgeError(
        f"cannot average {_type_of(array)}; expected an array "
        f"of {', '.join(_FRAMEWORKS)} or anything with __dlpack__, a list, tuple or dict of them, "
        "a JAX pytree, or a module or model of torch, Keras or TensorFlow" + _hint(array)
    )


def _hint(found: Any) -> str:
    """What was probably meant by an object that is no array."""
    if isinstance(found, str | ItemsView):
        return "; pairs of names and arrays, such as model.named_parameters(), go into dict(...)"
    if isinstance(found, Iterator):
        return "; inside of another container put list(...) around it"
    return "; call it first" if isinstance(found, MethodType | FunctionType) else ""


def memory_of(array: Any) -> ModuleType:
    """The bridge of the framework whose arrays hold averages of such an array."""
    return memory_by(bridge_of(array))


@cache
def memory_by(bridge: ModuleType) -> ModuleType:
    """The bridge whose arrays hold averages of a bridge's."""
    other = getattr(bridge, "MEMORY", None)
    return bridge if other is None else _bridge(other)


def describe(array: Any) -> TensorSpec:
    """Where an array lies now."""
    spec: TensorSpec = bridge_of(array).describe(array)
    return spec


def written(arrays: Iterable[Any]) -> list[tuple[Callable[[Any], None], list[Any]]]:
    """The arrays by the function to call with them after each write, where there is one."""
    found: dict[ModuleType, list[Any]] = {}
    for array in arrays:
        found.setdefault(bridge_of(array), []).append(array)
    tells = ((getattr(bridge, "written", None), owned) for bridge, owned in found.items())
    return [(tell, owned) for tell, owned in tells if tell is not None]


class Versions(Protocol):
    """What a framework knows of arrays that hold other contents for a while."""

    def begin(self) -> None:
        """They hold other contents now."""

    def written(self) -> list[Any]:
        """Those that somebody wrote since :meth:`begin`."""

    def end(self, *, put_back: bool) -> None:
        """Their contents are back, in the memory they were in if ``put_back``."""


def versions_of(arrays: Iterable[Any]) -> list[Versions]:
    """The versions of arrays, for each framework that counts them."""
    found: dict[Callable[[list[Any]], Versions], list[Any]] = {}
    for array in arrays:
        bridge = bridge_of(array)
        if hasattr(bridge, "Versions"):
            found.setdefault(bridge.Versions, []).append(array)
    return [kind(members) for kind, members in found.items()]


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


def fitted(array: Any, spec: TensorSpec) -> Any:
    """Return what of a saved array belongs to a tensor of the same full shape.

    Collective where the array is divided among processes in another way than the tensor.

    Parameters
    ----------
    array : array
        Whole, or divided.
    spec : TensorSpec
    """
    bridge = bridge_of(array)
    found: TensorSpec = bridge.describe(array)
    if found.division is not None:
        if found.division == spec.division:
            return array
        array = bridge.gathered(array)
    if spec.whole is None or spec.offset is None:
        return array
    block = zip(spec.offset, spec.shape, strict=True)
    return array[tuple(slice(first, first + extent) for first, extent in block)]


def part_of(array: Any) -> Any:
    """Return this process's part of a divided array, and any other array as it is."""
    bridge = bridge_of(array)
    return bridge.part_of(array) if hasattr(bridge, "part_of") else array


def is_divided(array: Any) -> bool:
    """Return whether an array is divided among processes."""
    bridge = bridge_of(array)
    return hasattr(bridge, "is_divided") and bool(bridge.is_divided(array))


def ranks_of(arrays: Iterable[Any]) -> Ranks | None:
    """Return the processes that hold parts of the same arrays; None if no array is divided."""
    arrays = list(arrays)
    for bridge in {*map(bridge_of, arrays)}:
        if hasattr(bridge, "ranks_of"):
            found: Ranks | None = bridge.ranks_of(arrays)
            if found is not None:
                return found
    return None


def reshard(container: Any) -> None:
    """Have a module hold its own parts of tensors, where it holds gathered tensors for a while."""
    for bridge in _loaded():
        if hasattr(bridge, "reshard"):
            bridge.reshard(container)


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


def state_of(container: Any) -> dict[str, tuple[str, Any]]:
    """What is saved of a container: key to the tensor's name in :func:`leaves_of` and the entry.

    For a torch module the keys and entries of its ``state_dict()``, for others the names.
    """
    owner = next((bridge for bridge in _loaded() if bridge.walk(container) is not None), None)
    if owner is not None and hasattr(owner, "state_of"):
        found: dict[str, tuple[str, Any]] = owner.state_of(container)
        return found
    return {leaf.name: (leaf.name, leaf.spec.owner) for leaf in leaves_of(container).items}


def _entries(tree: Any) -> list[tuple[str, Any]] | None:
    """What a list, tuple or dict holds, by name; None for anything else."""
    if type(tree) in _owners:  # an array of a kind that was seen before
        return None
    if isinstance(tree, Mapping):
        return [(str(key), value) for key, value in tree.items()]
    if isinstance(tree, list | tuple):
        return [(str(i), value) for i, value in enumerate(tree)]
    return None


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _check_nesting(tree: Any, path: str = "", above: tuple[Any, ...] = ()) -> None:
    """Refuse what no walk would come to the end of; JAX leaves Python unusable after such a one.

    Raises
    ------
    BridgeError
        Naming the place.
    """
    entries = _entries(tree)
    if entries is None:
        return
    if any(tree is one for one in above):
        raise BridgeError(f"{path!r} is a {type(tree).__name__} that holds itself")
    if len(above) == _DEEPEST:
        raise BridgeError(
            f"lists, tuples or dicts are nested more than {_DEEPEST} deep; give the arrays in one"
        )
    above = (*above, tree)
    for key, value in entries:
        _check_nesting(value, _below(path, key), above)


def _flatten(tree: Any, path: str, found: dict[str, Any], held: list[Held]) -> None:
    entries = _entries(tree)
    if entries is not None:
        if not isinstance(tree, tuple):
            held.append(Held(tree))
        for key, value in entries:
            _flatten(value, _below(path, key), found, held)
    elif path in found:
        raise BridgeError(f"two entries are called {path!r}; give them distinct names")
    else:
        found[path] = tree


class _Tree:
    """The structure of nested lists, tuples and dicts."""

    def __init__(self, container: Any, names: list[str]) -> None:
        self._names = names
        self._places = _rebuilt(container, iter(range(len(names))))

    def flatten(self, container: Any, *, write: bool = False) -> Sequence[Any] | None:
        found: dict[str, Any] = {}
        try:
            _flatten(container, "", found, [])
        except RecursionError:
            return None
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
        For an object that no bridge knows, and for lists and dicts that hold themselves or are
        nested too deeply.
    """
    _check_nesting(container)
    for bridge in _loaded():
        leaves: Leaves | None = bridge.walk(container)
        if leaves is not None:
            return leaves
    found: dict[str, Any] = {}
    held: list[Held] = []
    _flatten(container, "", found, held)
    items = [Leaf(name, named(name, describe, array)) for name, array in found.items()]
    moving = any(hasattr(bridge, "finder") for bridge in {*map(bridge_of, found.values())})
    return Leaves(items, describe, held, structure=_Tree(container, list(found)), moving=moving)
