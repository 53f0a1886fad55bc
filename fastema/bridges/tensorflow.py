"""The bridge to TensorFlow variables and tensors in host memory.

Tensors are immutable. A variable changes, usually by getting another tensor, so its address is new
after most steps. A variable is written in place only after TensorFlow has given it memory that no
tensor shares. It does so by the protocol of its scatter operations, which copy a value that is
still referenced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cache
from operator import is_
from typing import Any, Final, TypeAlias

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fastema.bridges.dlpack import capsule_address
from fastema.bridges.moving import Finder, FoundArrays
from fastema.bridges.names import code_of, describe_named
from fastema.errors import BridgeError, DTypeError
from fastema.layout.dtypes import NAMES
from fastema.layout.flat import row_major
from fastema.layout.spec import Leaf, Leaves, TensorSpec

MEMORY: Final = "numpy"
"""The bridge whose arrays hold averages of these arrays."""

_Operation: TypeAlias = Callable[[Any, Any], Any]
"""A function that reads a variable by its handle and dtype, eagerly or in a graph."""

_BLOCK: Final = 32
"""Variables that one call of a traced function reads."""

_FEW: Final = 8
"""Up to this many variables are read as fast one by one."""


class Unshared:
    """A tensor that may be written, as :func:`unshare` has just returned it."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def owns(obj: Any) -> bool:
    """Return whether an object is a TensorFlow tensor or variable."""
    return isinstance(obj, tf.Variable | tf.Tensor | Unshared)


def never_changes(obj: Any) -> bool:
    """Return whether an object is a tensor: tensors are immutable, variables are not."""
    return isinstance(obj, tf.Tensor)


def scalar(value: Any) -> float | Callable[[], float]:
    """Return the number in a one-element array; for a GPU, a function that reads it later."""
    _refuse_graph_and_strategy(value)
    tensor = tf.convert_to_tensor(value)  # immutable, so it can be read later
    if "CPU" in tensor.device:
        return float(tensor.numpy().item())
    return lambda: float(tensor.numpy().item())


def code(dtype: Any) -> str:
    """Return the code of a TensorFlow dtype; raise a DTypeError if it has no kernel."""
    if not isinstance(dtype, tf.DType):
        raise DTypeError(f"{dtype!r} is not a TensorFlow dtype")
    return code_of("TensorFlow", dtype.name)


def _refuse_graph_and_strategy(variable: Any) -> None:
    if not tf.executing_eagerly():
        raise BridgeError(
            "inside tf.function this would run once, when the function is traced: call it outside, "
            "or use fastema.tensorflow.ExponentialMovingAverage"
        )
    if isinstance(variable, tf.distribute.DistributedValues):
        raise BridgeError("a variable of a distribution strategy has several values; not supported")


def _read_value(handle: Any, dtype: Any) -> Any:
    return tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)


def _unshared_rows(handle: Any, dtype: Any) -> Any:
    none = tf.constant([], tf.int32)
    # Gather and write zero rows, for any shape. A graph would optimize the gather alone away.
    nothing = tf.raw_ops.ResourceGather(resource=handle, indices=none, dtype=dtype)
    tf.raw_ops.ResourceScatterUpdate(resource=handle, indices=none, updates=nothing)
    tf.raw_ops.DisableCopyOnRead(resource=handle)
    return _read_value(handle, dtype)


def _unshared_whole(handle: Any, dtype: Any) -> Any:
    """Unshare a scalar variable by assigning to its slice of no dimensions, and read it."""
    none, value = tf.constant([], tf.int32), _read_value(handle, dtype)
    tf.raw_ops.ResourceStridedSliceAssign(
        ref=handle, begin=none, end=none, strides=none, value=value
    )
    tf.raw_ops.DisableCopyOnRead(resource=handle)
    return _read_value(handle, dtype)


def _choose_read(variable: Any, write: bool) -> _Operation:
    """Return the function that reads a variable, after unsharing its memory if ``write``."""
    if not write:
        return _read_value
    return _unshared_rows if variable.shape.rank else _unshared_whole


def unshare(variable: Any) -> Any:
    """Give a variable memory that no other tensor shares, and return a tensor of it.

    Copies only shared memory. Call it again before every write; it also works in a graph.
    """
    return _choose_read(variable, True)(variable.handle, variable.dtype)


def _address(tensor: Any) -> int:
    return capsule_address(tf.experimental.dlpack.to_dlpack(tensor))


@cache
def _can_be_written() -> bool:
    """Return whether :func:`unshare` works in this version of TensorFlow."""
    for initial in (np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3), np.float32(3.0)):
        variable = tf.Variable(initial)
        held = variable.value()
        memory = _address(unshare(variable))
        now = _read_value(variable.handle, variable.dtype)
        if memory in (_address(held), 0) or _address(now) != memory:
            return False
    return True


def describe(array: Any) -> TensorSpec:
    """Return the TensorSpec of a tensor or of a variable's current value.

    Raises a BridgeError in a ``tf.function``, for an array that is not on the host, and for a
    variable of a distribution strategy.
    """
    _refuse_graph_and_strategy(array)
    writable = not isinstance(array, tf.Tensor)
    tensor = array.tensor if isinstance(array, Unshared) else array
    kind = code(tensor.dtype)
    if isinstance(array, tf.Variable):
        writable = _can_be_written()
        # Distinct variables that share memory get separate memory here.
        tensor = _choose_read(array, writable)(array.handle, array.dtype)
    if "CPU" not in tensor.backing_device:
        raise BridgeError(
            f"a TensorFlow tensor on {tensor.backing_device}: only host memory can be "
            "read; put it there with tf.device('CPU:0')"
        )
    shape = tuple(tensor.shape)
    return TensorSpec(
        address=_address(tensor) if 0 not in shape else 0,
        shape=shape,
        strides=row_major(shape),
        dtype=kind,
        device="cpu",
        writable=writable,
        owner=array,
    )


def _is_foreign_thread() -> bool:
    """Return whether TensorFlow called this code from a graph, which waits for this thread.

    A traced function would then need another thread of the same pool, which may have only this one.
    """
    return isinstance(threading.current_thread(), threading._DummyThread)


@cache
def _trace_reads(operation: _Operation, dtype: Any) -> tuple[Any, list[Any]]:
    """Return a traced function that reads a block of placeholder variables, and their handles."""
    title = f"fastema/{operation.__name__}/{dtype.name}"
    with tf.init_scope(), tf.device("CPU:0"):
        stand_ins = [
            tf.raw_ops.VarHandleOp(dtype=dtype, shape=tf.TensorShape(None), shared_name=name)
            for name in (f"{title}/{place}" for place in range(_BLOCK))
        ]
        for handle in stand_ins:
            tf.raw_ops.AssignVariableOp(resource=handle, value=tf.zeros([1], dtype))
    function = tf.function(
        lambda: [operation(handle, dtype) for handle in stand_ins], autograph=False
    )
    return function.get_concrete_function(), stand_ins


def _bind_reads(
    operation: _Operation, dtype: Any, handles: Sequence[Any]
) -> Callable[[], list[Any]]:
    """Return a function that reads at most :data:`_BLOCK` variables in one traced call."""
    traced, stand_ins = _trace_reads(operation, dtype)
    # Replace captures, not arguments: dispatching arguments takes longer than the operations.
    function = copy(traced)
    function.set_external_captures([*handles, *stand_ins[len(handles) :]])

    def read() -> list[Any]:
        # Passing operations this small to other threads takes longer than running them.
        with tf.experimental.function_executor_type("SINGLE_THREADED_EXECUTOR"):
            found: list[Any] = function()
        return found[: len(handles)]

    return read


class _VariableReader:
    """Reads a fixed list of variables, in blocks from the third call on."""

    def __init__(self, variables: Sequence[Any], write: bool) -> None:
        kinds: dict[tuple[_Operation, Any], list[int]] = {}
        for place, one in enumerate(variables):
            kinds.setdefault((_choose_read(one, write), one.dtype), []).append(place)
        self._parts = [
            (*kind, places[first : first + _BLOCK])
            for kind, places in kinds.items()
            for first in range(0, len(places), _BLOCK)
        ]
        self._handles = [variable.handle for variable in variables]
        self._blocks: dict[int, Callable[[], list[Any]]] = {}
        self._calls = 0

    def __call__(self) -> list[Any]:
        self._calls += 1
        in_blocks = self._calls > 2 and not _is_foreign_thread()
        found: list[Any] = [None] * len(self._handles)
        for number, (operation, dtype, places) in enumerate(self._parts):
            handles = [self._handles[place] for place in places]
            if in_blocks and len(places) > _FEW:
                if number not in self._blocks:
                    self._blocks[number] = _bind_reads(operation, dtype, handles)
                values = self._blocks[number]()
            else:
                values = [operation(handle, dtype) for handle in handles]
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return found


class _VariableFinder:
    """Finder for tensors and variables; see :mod:`fastema.bridges.moving`."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = [spec.with_owner(None) for spec in specs]
        self._known: list[Any] = []
        self._readers: dict[bool, _VariableReader] = {}
        self._variables: dict[int, Any] = {}
        self._fixed: list[bool] = []

    def __call__(self, arrays: Sequence[Any], write: bool) -> FoundArrays | None:
        if not tf.executing_eagerly():
            return None
        if not self._are_known(arrays) and not self._fit(arrays):
            return None
        read = self._readers[write]() if self._variables else ()
        values = dict(zip(self._variables, read, strict=True))
        tensors = [_tensor(one, values) for one in arrays]
        for tensor, spec, fixed in zip(tensors, self._specs, self._fixed, strict=True):
            if not fixed and not _is_like(tensor, spec):
                return None
        addresses = [
            _address(tensor) if spec.size else 0
            for tensor, spec in zip(tensors, self._specs, strict=True)
        ]
        return addresses, tensors

    def _are_known(self, arrays: Sequence[Any]) -> bool:
        return len(self._known) == len(arrays) and all(map(is_, self._known, arrays))

    def _fit(self, arrays: Sequence[Any]) -> bool:
        """Prepare to read other arrays; return whether they match the specs."""
        fixes = [isinstance(one, tf.Variable) and one.shape.is_fully_defined() for one in arrays]
        for one, spec, fixed in zip(arrays, self._specs, fixes, strict=True):
            if not owns(one) or (fixed and not _is_like(one, spec)):
                return False
        self._fixed = fixes
        # Read each variable once: unsharing a variable for a second read would separate it from the
        # first tensor, which is still referenced.
        self._variables = {id(one): one for one in arrays if isinstance(one, tf.Variable)}
        variables = list(self._variables.values())
        self._readers = {}
        if variables:
            self._readers = {write: _VariableReader(variables, write) for write in (False, True)}
        # Do not keep tensors alive: every call brings new ones.
        self._known = list(arrays) if all(id(one) in self._variables for one in arrays) else []
        return True


def _is_like(one: Any, spec: TensorSpec) -> bool:
    # The public shape is an object that is slow to create and to compare.
    quick = getattr(one, "_shape_tuple", None)
    shape = tuple(one.shape.as_list()) if quick is None else quick()
    return shape == spec.shape and NAMES.get(one.dtype.name) == spec.dtype


def _tensor(array: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(array, tf.Variable):
        return values[id(array)]
    return array.tensor if isinstance(array, Unshared) else array


def finder(specs: Sequence[TensorSpec], arrays: Sequence[Any]) -> Finder:
    """Return a finder for arrays like these."""
    return _VariableFinder(specs)


def to_framework(memory: NDArray[Any]) -> Any:
    """Return a copy of a NumPy array as a tensor."""
    return tf.constant(memory)


class _ModuleStructure:
    """Structure of a module: its variables by their paths."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def flatten(self, container: Any, *, write: bool = False) -> Sequence[Any] | None:
        if not isinstance(container, tf.Module):
            return None
        found = _variables(container)
        if [name for name, _ in found] != self._names:
            return None
        return [variable for _, variable in found]

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        raise BridgeError("cannot make a new tf.Module: use swapped(), or copy_to(other_module)")


def _variables(module: Any) -> list[tuple[str, Any]]:
    found = module._flatten(predicate=lambda one: isinstance(one, tf.Variable), with_path=True)
    return [(".".join(map(str, path)), variable) for path, variable in found]


def walk(container: Any) -> Leaves | None:
    """Return the variables of a module under their paths; None for anything else.

    Variables that are not trainable are buffers.
    """
    if not isinstance(container, tf.Module) or isinstance(container, tf.Variable):
        return None
    items = [
        Leaf(
            name,
            describe_named(name, describe, variable),
            "weight" if variable.trainable else "buffer",
        )
        for name, variable in _variables(container)
    ]
    structure = _ModuleStructure([leaf.name for leaf in items])
    return Leaves(items, describe, structure=structure, moving=True)
