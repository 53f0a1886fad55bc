"""Look up the bridge of an object, and flatten containers into tensors with names."""

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
from typing import Any, Final

from fastema.bridges.names import LONE, describe_named, refuse_repeated
from fastema.errors import ArgumentError, BridgeError, DTypeError
from fastema.layout.spec import Leaf, Leaves, Ranks, StateEntry, TensorContainer, TensorSpec

__all__ = [
    "bridge_of",
    "call_bridge",
    "describe",
    "dtype_code",
    "is_divided",
    "leaves_of",
    "link_of",
    "list_iterators",
    "memory_by",
    "memory_of",
    "part_of",
    "ranks_of",
    "refuse_emptied",
    "reshard",
    "scalar",
    "select_part",
    "state_of",
    "versions_of",
    "world_of",
    "write_listeners",
]

# Import names, also of the bridges. Keras first: its models are modules of its backends too.
_FRAMEWORKS: Final = ("keras", "torch", "tensorflow", "jax", "cupy", "numpy")

_DEEPEST: Final = 200
"""Maximum nesting of containers, far below Python's recursion limit."""

_ANY_OTHER: Final = "dlpack"
"""The bridge for arrays of any other framework with DLPack export."""


def _imported_bridges() -> Iterator[ModuleType]:
    """Yield the bridges of imported frameworks; no object can belong to any other."""
    for framework in _FRAMEWORKS:
        if framework in sys.modules:
            yield _bridge(framework)
    yield _bridge(_ANY_OTHER)


@cache
def _bridge(name: str) -> ModuleType:
    return import_module(f"fastema.bridges.{name}")


_owners: Final[dict[type[Any], ModuleType]] = {}
"""Cache of bridges by array type; a type belongs to one bridge only."""


def bridge_of(array: Any) -> ModuleType:
    """Return the bridge of an array; raise a BridgeError if no known framework owns it."""
    known = _owners.get(type(array))
    if known is not None and known.owns(array):
        return known
    for bridge in _imported_bridges():
        if bridge.owns(array):
            _owners[type(array)] = bridge
            return bridge
    raise BridgeError(
        f"cannot average {_type_of(array)}; expected an array "
        f"of {', '.join(_FRAMEWORKS)} or anything with __dlpack__, a list, tuple or dict of them, "
        "a JAX pytree, or a module or model of torch, Keras or TensorFlow" + _hint(array)
    )


def _hint(found: Any) -> str:
    """Return advice for an object that is not an array, to append to an error message."""
    if isinstance(found, str | ItemsView):
        return "; wrap pairs of names and arrays, such as model.named_parameters(), in dict(...)"
    if isinstance(found, Iterator):
        return "; inside another container, wrap it in list(...)"
    return "; call it first" if isinstance(found, MethodType | FunctionType) else ""


def memory_of(array: Any) -> ModuleType:
    """Return the bridge of the framework in whose memory averages of an array are kept."""
    return memory_by(bridge_of(array))


@cache
def memory_by(bridge: ModuleType) -> ModuleType:
    """Return the bridge whose arrays hold averages of the arrays of another bridge."""
    other = getattr(bridge, "MEMORY", None)
    return bridge if other is None else _bridge(other)


def describe(array: Any) -> TensorSpec:
    """Return the current TensorSpec of an array of any framework."""
    spec: TensorSpec = bridge_of(array).describe(array)
    return spec


def _by_function(arrays: Iterable[Any], name: str) -> list[tuple[Callable[..., Any], list[Any]]]:
    """Group arrays by their bridge's function ``name``; skip arrays whose bridge has none."""
    found: dict[Callable[..., Any], list[Any]] = {}
    for array in arrays:
        function = getattr(bridge_of(array), name, None)
        if function is not None:
            found.setdefault(function, []).append(array)
    return list(found.items())


def write_listeners(arrays: Iterable[Any]) -> list[tuple[Callable[[Any], None], list[Any]]]:
    """Group arrays by the function that has to be called with them after each write, if any."""
    return _by_function(arrays, "notify_write")


def versions_of(arrays: Iterable[Any]) -> list[Any]:
    """Return the ``Versions`` of arrays, one per framework that counts writes."""
    return [kind(members) for kind, members in _by_function(arrays, "Versions")]


def openmp_of(arrays: Iterable[Any]) -> tuple[int, int] | None:
    """Return the OpenMP functions of a framework of these arrays, see ``torch_openmp``, if any."""
    for openmp, _ in _by_function(arrays, "openmp"):
        team: tuple[int, int] | None = openmp()
        return team
    return None


def refuse_emptied(specs: Mapping[str, TensorSpec]) -> None:
    """Raise a BridgeError if a framework's float tensors seem to have lost their elements."""
    empty = [name for name, spec in specs.items() if spec.full_shape == (0,)]
    if empty and hasattr(bridge := bridge_of(specs[empty[0]].owner), "refuse_emptied"):
        bridge.refuse_emptied(empty, len(specs))


def scalar(value: Any) -> float | Callable[[], float]:
    """Return a number as a float, or a function that reads it later if it is still on a device.

    Accepts numbers and one-element arrays of any framework, outside of traced functions. Raises a
    BridgeError for anything else.
    """
    try:
        return _scalar(value)
    except BridgeError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise BridgeError(f"expected a number, got {_type_of(value)} ({error})") from None


def _scalar(value: Any) -> float | Callable[[], float]:
    if isinstance(value, Real):
        return float(value)
    for bridge in _imported_bridges():
        if hasattr(bridge, "scalar") and bridge.owns(value):
            if prod(value.shape) != 1:
                raise BridgeError(
                    f"expected one number, got {_type_of(value)} of shape {tuple(value.shape)}; "
                    "take its mean, or give update_many a series"
                )
            found: float | Callable[[], float] = bridge.scalar(value)
            return found
    if isinstance(value, Complex | str) or not hasattr(type(value), "__float__"):
        raise BridgeError(f"expected a number, got {_type_of(value)}")
    return float(value)  # Decimal, scalars of ml_dtypes


def _type_of(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def select_part(array: Any, spec: TensorSpec) -> Any:
    """Return the part of a saved array that this process's tensor with the same full shape holds.

    Collective if the array is sharded in another way than the tensor.
    """
    bridge = bridge_of(array)
    division = bridge.describe(array).division
    if division is not None:
        if division == spec.division:
            return array
        array = bridge.gather(array)
    if spec.whole is None or spec.offset is None:
        return array
    block = zip(spec.offset, spec.shape, strict=True)
    return array[tuple(slice(first, first + extent) for first, extent in block)]


def call_bridge(name: str, array: Any, default: Any) -> Any:
    """Call the function ``name`` of an array's bridge, or return ``default`` if it has none."""
    function = getattr(bridge_of(array), name, None)
    return default if function is None else function(array)


def part_of(array: Any) -> Any:
    """Return this process's part of a sharded array, and any other array unchanged."""
    return call_bridge("part_of", array, array)


def is_divided(array: Any) -> bool:
    """Return whether an array is sharded over processes."""
    return bool(call_bridge("is_divided", array, False))


def ranks_of(arrays: Iterable[Any]) -> Ranks | None:
    """Return the processes that hold parts of the same arrays; None if no array is sharded."""
    return _first_ranks(arrays, "ranks_of")


def world_of(arrays: Iterable[Any]) -> Ranks | None:
    """Return all processes that train together; None if there is only one."""
    return _first_ranks(arrays, "world_of")


def _first_ranks(arrays: Iterable[Any], name: str) -> Ranks | None:
    found = (function(members) for function, members in _by_function(arrays, name))
    return next((ranks for ranks in found if ranks is not None), None)


def link_of(tensors: Mapping[str, Any]) -> Any:
    """Return the link between tensors and host memory; see :mod:`fastema.bridges.torch_link`."""
    makers = _by_function(tensors.values(), "link")
    if len(makers) != 1 or len(makers[0][1]) < len(tensors):
        raise BridgeError(
            "offload=True works for PyTorch models only: it copies their tensors to the host"
        )
    return makers[0][0](tensors)


def reshard(container: Any, *, interrupted: bool = False) -> None:
    """Make a module hold its own shards again where it holds gathered parameters (FSDP2).

    During a forward pass it keeps them. Pass ``interrupted`` if there is none, so that one which
    has not ended must have raised.
    """
    for bridge in _imported_bridges():
        if hasattr(bridge, "reshard"):
            bridge.reshard(container, interrupted=interrupted)


def dtype_code(value: Any, option: str) -> str:
    """Return the code of any framework's dtype object; raise an ArgumentError otherwise.

    The error names the option that the value was given for.
    """
    for bridge in _imported_bridges():
        if hasattr(bridge, "code"):
            with suppress(DTypeError, TypeError, ValueError):  # what np.dtype() raises
                code: str = bridge.code(value)
                return code
    raise ArgumentError(f"{option}={value!r}: expected a float dtype, or a name such as 'float32'")


def state_of(container: Any) -> dict[str, StateEntry]:
    """Return what a container saves: for a torch module the entries of ``state_dict()`` by key.

    For any other container the keys are the names in :func:`leaves_of`.
    """
    owner, _ = _walk_container(container)
    if owner is not None and hasattr(owner, "state_of"):
        found: dict[str, StateEntry] = owner.state_of(container)
        return found
    return {
        leaf.name: StateEntry(leaf.name, leaf.name, leaf.spec.owner)
        for leaf in leaves_of(container).items
    }


def _flatten(
    tree: Any, path: str = "", above: tuple[Any, ...] = ()
) -> tuple[list[tuple[str, Any]], list[TensorContainer]]:
    """Return names and leaves of nested lists, tuples and dicts, and the lists and dicts in it.

    Raises a BridgeError for containers that contain themselves or are nested too deep, before JAX
    sees them: its own traversal of one leaves Python unusable.
    """
    entries: Iterable[tuple[Any, Any]]
    if isinstance(tree, Mapping):
        entries = tree.items()
    elif isinstance(tree, list | tuple):
        entries = enumerate(tree)
    else:
        return [(path if above else LONE, tree)], []
    if any(tree is one for one in above):
        raise BridgeError(f"{path!r} is a {type(tree).__name__} that contains itself")
    if len(above) == _DEEPEST:
        raise BridgeError(
            f"lists, tuples or dicts are nested more than {_DEEPEST} deep; put the arrays into one"
        )
    leaves: list[tuple[str, Any]] = []
    held = [] if isinstance(tree, tuple) else [TensorContainer(tree)]
    for key, value in entries:
        name = f"{path}.{key!s}" if path else str(key)
        if type(value) in _owners:  # an array type seen before
            leaves.append((name, value))
            continue
        more, inner = _flatten(value, name, (*above, tree))
        leaves += more
        held += inner
    return leaves, held


class _Tree:
    """Structure of nested lists, tuples and dicts."""

    def __init__(self, container: Any, names: list[str]) -> None:
        self._names = names
        self._places = _rebuild_tree(container, iter(range(len(names))))

    def flatten(self, container: Any, *, write: bool = False) -> Sequence[Any] | None:
        try:
            leaves, _ = _flatten(container)
        except BridgeError:
            return None
        names = [name for name, _ in leaves]
        return [array for _, array in leaves] if names == self._names else None

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        return _rebuild_tree(self._places, iter(tensors))


def _rebuild_tree(tree: Any, leaves: Iterator[Any]) -> Any:
    """Return a tree with the structure of ``tree`` and its leaves taken from an iterator."""
    if isinstance(tree, Mapping):
        return {key: _rebuild_tree(value, leaves) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        parts = [_rebuild_tree(value, leaves) for value in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*parts)
        return tuple(parts) if isinstance(tree, tuple) else parts
    return next(leaves)


def list_iterators(container: Any) -> Any:
    """Return a container that can be iterated twice: turn ``model.parameters()`` into a list."""
    return list(container) if isinstance(container, Iterator | ValuesView) else container


def _walk_container(container: Any) -> tuple[ModuleType | None, Leaves | None]:
    """Return the bridge that knows a container, and its leaves; (None, None) if none does."""
    for bridge in _imported_bridges():
        leaves = bridge.walk(container) if hasattr(bridge, "walk") else None
        if leaves is not None:
            return bridge, leaves
    return None, None


def leaves_of(container: Any) -> Leaves:
    """Return all tensors of a module, model, pytree, array, or nested lists, tuples and dicts.

    Names are the framework's own for modules, otherwise keys and positions joined by dots. Raises a
    BridgeError for objects that no bridge knows, and for containers that contain themselves or are
    nested too deep.
    """
    entries, held = _flatten(container)
    _, leaves = _walk_container(container)
    if leaves is not None:
        return leaves
    refuse_repeated(name for name, _ in entries)
    found = dict(entries)
    items = [Leaf(name, describe_named(name, describe, array)) for name, array in found.items()]
    moving = any(hasattr(bridge, "finder") for bridge in {*map(bridge_of, found.values())})
    return Leaves(items, describe, held, structure=_Tree(container, list(found)), moving=moving)
