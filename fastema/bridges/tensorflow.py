"""TensorFlow variables and tensors, in the memory of the host.

Tensors never change. Variables do, as a rule by being given another tensor, so that they lie
elsewhere after most steps. They are written in place only after TensorFlow itself has given them
memory that no tensor shares, by the protocol of its own scatter operations, which copy at that
point where somebody still holds the old value.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import is_
from typing import Any, Final

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fastema.bridges.dlpack import capsule_address
from fastema.bridges.moving import Finder, Found
from fastema.bridges.names import named
from fastema.errors import BridgeError, DTypeError
from fastema.layout.dtypes import NAMES
from fastema.layout.flat import row_major
from fastema.layout.spec import Leaf, Leaves, TensorSpec

__all__ = [
    "MEMORY",
    "Unshared",
    "code",
    "describe",
    "finder",
    "owns",
    "scalar",
    "shown",
    "unshare",
    "walk",
]

MEMORY: Final = "numpy"
"""The framework whose arrays hold averages of these."""


class Unshared:
    """A tensor of a variable's own memory, right after :func:`unshare`: it may be written.

    Parameters
    ----------
    tensor : tf.Tensor
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def owns(obj: Any) -> bool:
    """Whether a tensor or a variable of TensorFlow."""
    return isinstance(obj, tf.Variable | tf.Tensor | Unshared)


def scalar(value: Any) -> float | Callable[[], float]:
    """The number in a tensor or a variable of one element; on a GPU, what reads it later.

    Raises
    ------
    BridgeError
        While a function is traced, and for a variable of a distribution strategy.
    """
    _refuse(value)
    tensor = tf.convert_to_tensor(value)  # which never changes
    if "CPU" in tensor.device:
        return float(tensor.numpy().item())
    return lambda: float(tensor.numpy().item())


def code(dtype: Any) -> str:
    """The code of a TensorFlow dtype.

    Raises
    ------
    DTypeError
        For one that has no kernel.
    """
    if not isinstance(dtype, tf.DType):
        raise DTypeError(f"{dtype!r} is no dtype of TensorFlow")
    if dtype.name not in NAMES:
        raise DTypeError(
            f"TensorFlow dtype {dtype.name} has no kernel; known are {', '.join(NAMES)}"
        )
    return NAMES[dtype.name]


def _refuse(variable: Any) -> None:
    if not tf.executing_eagerly():
        raise BridgeError(
            "inside tf.function this would run once, when the function is traced: call it outside, "
            "or use fastema.tensorflow.ExponentialMovingAverage"
        )
    if isinstance(variable, tf.distribute.DistributedValues):
        raise BridgeError("a variable of a distribution strategy has several values; not supported")


def _read(variable: Any) -> Any:
    return tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)


def unshare(variable: Any) -> Any:
    """Give a variable memory that no other tensor shares, and return a tensor of it.

    Copies only where it was shared. To be called again before every write; may be part of a graph.
    """
    handle, dtype, shape = variable.handle, variable.dtype, variable.shape
    none = tf.zeros([0], tf.int32)
    if shape.rank and shape[1:].is_fully_defined():
        nothing = tf.zeros([0, *shape[1:]], dtype)
        tf.raw_ops.ResourceScatterUpdate(resource=handle, indices=none, updates=nothing)
    else:  # no row to scatter, or of unknown size: a slice of no dimensions is everything
        tf.raw_ops.ResourceStridedSliceAssign(
            ref=handle, begin=none, end=none, strides=none, value=_read(variable)
        )
    tf.raw_ops.DisableCopyOnRead(resource=handle)
    return _read(variable)


def _address(tensor: Any) -> int:
    return capsule_address(tf.experimental.dlpack.to_dlpack(tensor))


@cache
def _can_be_written() -> bool:
    """Whether the protocol of :func:`unshare` holds in this version of TensorFlow."""
    for initial in (np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3), np.float32(3.0)):
        variable = tf.Variable(initial)
        held = variable.value()
        memory = _address(unshare(variable))
        if memory in (_address(held), 0) or _address(_read(variable)) != memory:
            return False
    return True


def describe(array: Any) -> TensorSpec:
    """Where a tensor, or the value of a variable, lies now.

    Raises
    ------
    DTypeError
        For a dtype that has no kernel.
    BridgeError
        Inside ``tf.function``, for a variable of a distribution strategy, and for what is not in
        the memory of the host.
    """
    _refuse(array)
    kind = code(array.tensor.dtype if isinstance(array, Unshared) else array.dtype)
    writable = not isinstance(array, tf.Tensor)
    if isinstance(array, tf.Variable):
        writable = _can_be_written()
        # Two variables may share memory, without being one; not so from here on.
        tensor = unshare(array) if writable else _read(array)
    else:
        tensor = array.tensor if isinstance(array, Unshared) else array
    if "CPU" not in tensor.backing_device:
        raise BridgeError(
            f"a TensorFlow tensor on {tensor.backing_device}: only the memory of the host can be "
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
    """Whether TensorFlow called us: a graph waits on this thread.

    A function would need another thread of the same pool, perhaps the only one.
    """
    return isinstance(threading.current_thread(), threading._DummyThread)


class _Reader:
    """Reads a fixed list of variables in one call of a function, from the second time on."""

    def __init__(self, variables: Sequence[Any], read: Callable[[Any], Any]) -> None:
        self._variables, self._read = variables, read
        self._calls = 0
        self._function: Any = None

    def _each(self) -> list[Any]:
        return [self._read(variable) for variable in self._variables]

    def __call__(self) -> list[Any]:
        self._calls += 1
        # Tracing costs as much as hundreds of reads.
        if self._calls < 3 or _is_foreign_thread():
            return self._each()
        if self._function is None:
            traced = tf.function(self._each, autograph=False)
            self._function = traced.get_concrete_function()  # there are no arguments to dispatch on
        # Handing such small operations to other threads takes longer than the operations.
        with tf.experimental.function_executor_type("SINGLE_THREADED_EXECUTOR"):
            found: list[Any] = self._function()
        return found


class _Finder:
    """Finds tensors and values of variables again."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = [spec.kept_by(None) for spec in specs]
        self._known: list[Any] = []
        self._readers: dict[bool, _Reader] = {}
        self._variables: dict[int, Any] = {}
        self._fixed: list[bool] = []

    def __call__(self, arrays: Sequence[Any], write: bool) -> Found | None:
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
        """Make ready for other arrays, if they are variables and tensors like those of before."""
        fixes = [isinstance(one, tf.Variable) and one.shape.is_fully_defined() for one in arrays]
        for one, spec, fixed in zip(arrays, self._specs, fixes, strict=True):
            if not owns(one) or (fixed and not _is_like(one, spec)):
                return False
        self._fixed = fixes
        # Once each: a second tensor of one variable that is to be written would part it from the
        # first, which is held.
        self._variables = {id(one): one for one in arrays if isinstance(one, tf.Variable)}
        variables = list(self._variables.values())
        self._readers = {}
        if variables:
            self._readers = {write: _Reader(variables, read) for write, read in _READS.items()}
        # Tensors are not kept alive: they are new ones at every call.
        self._known = list(arrays) if all(id(one) in self._variables for one in arrays) else []
        return True


_READS: Final = {False: _read, True: unshare}
"""How a variable is read, by whether it is about to be written."""


def _is_like(one: Any, spec: TensorSpec) -> bool:
    # The public shape is an object that is slow to make and to compare, and 200 tensors are looked
    # at in the time of an update.
    quick = getattr(one, "_shape_tuple", None)
    shape = tuple(one.shape.as_list()) if quick is None else quick()
    return shape == spec.shape and NAMES.get(one.dtype.name) == spec.dtype


def _tensor(array: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(array, tf.Variable):
        return values[id(array)]
    return array.tensor if isinstance(array, Unshared) else array


def finder(specs: Sequence[TensorSpec], arrays: Sequence[Any]) -> Finder:
    """What finds arrays like these again."""
    return _Finder(specs)


def shown(memory: NDArray[Any]) -> Any:
    """A tensor with a copy of NumPy memory."""
    return tf.constant(memory)


class _Module:
    """The structure of a module: its variables by their paths."""

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
        raise BridgeError("a tf.Module is not made anew: use swapped(), or copy_to(other_module)")


def _variables(module: Any) -> list[tuple[str, Any]]:
    found = module._flatten(predicate=lambda one: isinstance(one, tf.Variable), with_path=True)
    return [(".".join(map(str, path)), variable) for path, variable in found]


def walk(container: Any) -> Leaves | None:
    """The variables of a module by their paths; None for anything else.

    Those that are not trained are taken for buffers.
    """
    if not isinstance(container, tf.Module) or isinstance(container, tf.Variable):
        return None
    items = [
        Leaf(name, named(name, describe, variable), "weight" if variable.trainable else "buffer")
        for name, variable in _variables(container)
    ]
    structure = _Module([leaf.name for leaf in items])
    return Leaves(items, describe, structure=structure, moving=True)
