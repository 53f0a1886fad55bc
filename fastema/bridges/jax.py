"""The bridge to JAX arrays in host memory, and pytrees of them.

JAX arrays are immutable and only read. Their averages are NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from operator import attrgetter
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.errors import ConcretizationTypeError
from numpy.typing import NDArray

from fastema.bridges.moving import Finder, FoundArrays
from fastema.bridges.names import LONE, code_of, describe_named, refuse_repeated
from fastema.bridges.registry import describe as describe_any
from fastema.errors import BridgeError
from fastema.layout.flat import aligned_empty, row_major
from fastema.layout.spec import Leaf, Leaves, TensorSpec

MEMORY: Final = "numpy"
"""The bridge whose arrays hold averages of these arrays."""

# Costs a hundredth of the public check, but may be missing.
_at_top_level: Final = getattr(import_module("jax._src.core"), "trace_state_clean", None)


def owns(obj: Any) -> bool:
    """Return whether an object is a JAX array, traced ones included."""
    return isinstance(obj, jax.Array)


def never_changes(array: jax.Array) -> bool:
    """Return True: JAX arrays are immutable."""
    return True


def scalar(array: jax.Array) -> float | Callable[[], float]:
    """Return the number in a one-element array, or a function that reads it once it is computed.

    An array that was donated or deleted raises a BridgeError, perhaps only when it is read.
    """
    if isinstance(array, jax.core.Tracer):
        raise BridgeError(
            "a traced JAX array has no value, and this would run once, when the function is traced:"
            " return it from the function, and call this outside of it"
        )

    def number() -> float:
        if array.is_deleted():
            raise BridgeError(
                "this JAX array was donated to a computation, or deleted, before it was read"
            )
        return float(array.item())

    return number() if array.is_deleted() or array.is_ready() else number


def is_traced() -> bool:
    """Return whether JAX is tracing a function now."""
    if _at_top_level is not None:
        return not _at_top_level()
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def describe(array: jax.Array) -> TensorSpec:
    """Return the TensorSpec of an array, after waiting until it is computed.

    Raises a BridgeError in a traced function, and for an array that is not on one CPU device, or
    that was donated or deleted.
    """
    if isinstance(array, jax.core.Tracer) or is_traced():
        raise BridgeError(
            "a traced JAX array has no memory, and this would run once, when the function is "
            "traced: call it outside of jit, grad and vmap (inside, optax.incremental_update is "
            "the right tool)"
        )
    if array.is_deleted():
        raise BridgeError(
            "this JAX array was donated to a computation, or deleted; pass the arrays that "
            "came out of it: update(params)"
        )
    kind = code_of("JAX", array.dtype.name)
    devices = array.devices()
    if len(devices) != 1 or next(iter(devices)).platform != "cpu":
        raise BridgeError(
            f"a JAX array on {', '.join(sorted(map(str, devices)))}: only arrays on one CPU device "
            "can be read; average on the accelerator with optax.incremental_update inside jit"
        )
    array.block_until_ready()
    return TensorSpec(
        address=array.unsafe_buffer_pointer() if array.size else 0,
        shape=array.shape,
        strides=_strides(array),
        dtype=kind,
        device="cpu",
        writable=False,
        owner=array,
    )


def _strides(array: jax.Array) -> tuple[int, ...]:
    """Return an array's strides: row-major unless it was created with another layout."""
    if array.ndim < 2:
        return row_major(array.shape)
    form = array.format
    # JAX before 0.7, the last for Python 3.10, has another name for it.
    layout = form.layout if hasattr(form, "layout") else form.device_local_layout
    order = layout.major_to_minor
    within = row_major([array.shape[axis] for axis in order])
    return tuple(within[order.index(axis)] for axis in range(array.ndim))


def _layout_of(array: Any) -> Callable[[Any], Any]:
    """Return a getter of an array's layout (order of axes), which is not part of its sharding."""
    # Costs a tenth of the public attribute, but may be missing.
    return attrgetter("_pjrt_layout" if hasattr(array, "_pjrt_layout") else "format.layout")


def finder(specs: Sequence[TensorSpec], arrays: Sequence[Any]) -> Finder:
    """Return a finder for arrays like these; see :mod:`fastema.bridges.moving`."""
    layout_of = _layout_of(arrays[0])
    known = [(one.shape, one.dtype, layout_of(one)) for one in arrays]
    # Every computation creates new sharding objects, which are slow to compare.
    shardings = [one.sharding for one in arrays]

    def find(arrays: Sequence[Any], write: bool) -> FoundArrays | None:
        if is_traced():
            return None
        try:
            for place, (array, (shape, kind, layout)) in enumerate(zip(arrays, known, strict=True)):
                # First: reading the layout of a deleted array crashes.
                if array.is_deleted() or array.shape != shape or array.dtype != kind:
                    return None
                if layout_of(array) != layout:
                    return None
                sharding = array.sharding
                if sharding is not shardings[place]:
                    if sharding != shardings[place]:
                        return None
                    shardings[place] = sharding
            jax.block_until_ready(arrays)
            return [array.unsafe_buffer_pointer() for array in arrays], arrays
        except (AttributeError, RuntimeError, ConcretizationTypeError):
            return None  # not JAX arrays, deleted or traced: describe() will raise the reason

    return find


def to_framework(memory: NDArray[Any]) -> Any:
    """Return a copy of a NumPy array as a JAX array; as NumPy if JAX would narrow its dtype."""
    if jax.dtypes.canonicalize_dtype(memory.dtype) != memory.dtype:
        return memory.copy()
    # jnp.array() copies later, on another thread, when the average may have changed. A private copy
    # with the alignment that JAX needs becomes the array without a second copy.
    copy = aligned_empty(memory.shape, memory.dtype)
    copy[...] = memory
    return jax.device_put(copy)


class _Pytree:
    """Structure of a pytree."""

    def __init__(self, treedef: Any) -> None:
        self._treedef = treedef

    def flatten(self, container: Any, *, write: bool = False) -> Sequence[Any] | None:
        try:
            leaves, treedef = jax.tree_util.tree_flatten(container)
        except (TypeError, ValueError):  # keys that cannot be sorted
            return None
        return leaves if treedef == self._treedef else None

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        return jax.tree_util.tree_unflatten(self._treedef, tensors)


def _part(key: Any) -> str:
    """Return one entry of a path as text: a key, a position or a field name."""
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


def walk(container: Any) -> Leaves | None:
    """Return the leaves of a pytree that holds JAX arrays; None for anything else.

    A leaf's name joins the keys, positions and fields on its path by dots. All leaves must be
    arrays.
    """
    try:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(container)
    except (TypeError, ValueError):  # keys that cannot be sorted: not a pytree, but perhaps a dict
        return None
    if not any(owns(array) for _, array in leaves):
        return None
    found = [(".".join(map(_part, path)) if path else LONE, array) for path, array in leaves]
    refuse_repeated(name for name, _ in found)
    items = [Leaf(name, describe_named(name, describe_any, array)) for name, array in found]
    return Leaves(items, describe_any, structure=_Pytree(treedef), moving=True)
