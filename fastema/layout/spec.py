"""Descriptions of tensors: address, shape, strides, dtype, device and owner."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

from fastema.errors import FastemaError
from fastema.layout.device_context import DeviceContext
from fastema.layout.dtypes import DType, dtype

__all__ = [
    "Attributes",
    "Leaf",
    "Leaves",
    "Opaque",
    "Ranks",
    "Role",
    "Sharding",
    "StateEntry",
    "Structure",
    "TensorContainer",
    "TensorSpec",
]

Role = Literal["weight", "frozen", "buffer"]


class _Geometry(NamedTuple):
    """Properties of a tensor that depend only on shape, strides and dtype."""

    size: int
    nbytes: int
    dense: bool
    overlaps_itself: bool
    low: int  # first byte, relative to the address of the first element
    high: int  # byte after the last one, relative to the same address


# A model has many tensors and few shapes.
@lru_cache(maxsize=4096)
def _geometry(shape: tuple[int, ...], strides: tuple[int, ...], code: str) -> _Geometry:
    size, itemsize = math.prod(shape), dtype(code).itemsize
    axes = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    axes.sort(key=lambda axis: abs(axis[1]))  # innermost in memory first
    dense, overlaps_itself = True, False
    expected, reach = 1, 0
    for extent, stride in axes:
        dense = dense and stride == expected
        expected *= extent
        overlaps_itself = overlaps_itself or (abs(stride) <= reach and size > 0)
        reach += (extent - 1) * abs(stride)
    low = high = 0
    if size:
        ends = [(extent - 1) * stride for extent, stride in axes]
        low = itemsize * sum(end for end in ends if end < 0)
        high = itemsize * (1 + sum(end for end in ends if end > 0))
    return _Geometry(size, size * itemsize, dense, overlaps_itself, low, high)


class Sharding(Protocol):
    """How a tensor is sharded over processes. Two are equal on all processes or on none."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of the processes that hold the same part."""

    def tensor(self, array: Any) -> Any:
        """Return a sharded tensor around an array, in any memory, as this process's part."""

    def stacked(self, count: int) -> Sharding:
        """Return the sharding of ``count`` such tensors stacked along a new first axis."""


# Not frozen: a frozen dataclass takes five times as long to create, and every tensor has several.
@dataclass(unsafe_hash=True, slots=True)
class TensorSpec:
    """A tensor in memory; never modified. Comparisons ignore ``owner`` and all later fields.

    Attributes
    ----------
    address : address of the first element, in bytes
    strides : strides in elements
    dtype : a code of :data:`fastema.layout.dtypes.DTYPES`
    writable : whether the framework allows writing
    whole, offset : for a shard, the full shape and the index of the shard's first element in it
    owner : object that keeps the memory alive
    exchange : address of the DLPack exchange function of the tensor's class; 0 if it has none
    context : context of the device; None for the host
    fingerprint : ``owner -> object`` that changes with any of the above; cheaper than describing
    unwrap : ``owner -> tensor`` with the memory, if the owner is only a wrapper
    division : how the tensor is sharded over processes, even if this process holds all of it
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str
    writable: bool = True
    whole: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None
    owner: Any = field(default=None, compare=False, repr=False)
    exchange: int = field(default=0, compare=False, repr=False)
    context: DeviceContext | None = field(default=None, compare=False, repr=False)
    fingerprint: Callable[[Any], object] | None = field(default=None, compare=False, repr=False)
    unwrap: Callable[[Any], Any] | None = field(default=None, compare=False, repr=False)
    division: Sharding | None = field(default=None, compare=False, repr=False)

    def with_owner(self, owner: Any) -> TensorSpec:
        """Return a copy of this spec with another owner."""
        return replace(self, owner=owner)

    def at(self, address: int) -> TensorSpec:
        """Return a copy of this spec with another address."""
        return replace(self, address=address)

    def part(
        self, owner: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> TensorSpec:
        """Return the spec of a view into this tensor; offset and strides are in elements."""
        return TensorSpec(
            self.address + offset * self.kind.itemsize,
            *(shape, strides, self.dtype, self.device, self.writable),
            owner=owner,
            exchange=self.exchange,
            context=self.context,
            fingerprint=self.fingerprint,
        )

    def sharded_like(self, other: TensorSpec) -> TensorSpec:
        """Return a copy of this spec, sharded like another tensor of the same shape.

        Extra leading axes (the slots of a ring) are not sharded.
        """
        whole, offset, division = other.whole, other.offset, other.division
        slots = self.shape[: len(self.shape) - len(other.shape)]
        if slots and division is not None:
            division = division.stacked(*slots)
        if slots and whole is not None and offset is not None:
            whole, offset = (*slots, *whole), (*(0 for _ in slots), *offset)
        return replace(self, whole=whole, offset=offset, division=division)

    @property
    def tensor(self) -> Any:
        """The owner, or the tensor that it wraps."""
        return self.owner if self.unwrap is None else self.unwrap(self.owner)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of the full tensor, also for a shard."""
        return self.shape if self.whole is None else self.whole

    @property
    def kind(self) -> DType:
        """The :class:`DType` of the code ``dtype``."""
        return dtype(self.dtype)

    @property
    def _geometry(self) -> _Geometry:
        return _geometry(self.shape, self.strides, self.dtype)

    @property
    def size(self) -> int:
        """The number of elements."""
        return self._geometry.size

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self._geometry.nbytes

    @property
    def dense(self) -> bool:
        """Whether the elements fill one range of memory without gaps, in any order of axes."""
        return self._geometry.dense

    @property
    def overlaps_itself(self) -> bool:
        """Whether several indices may share an element: a stride of 0, or interleaved strides."""
        return self._geometry.overlaps_itself

    def span(self) -> tuple[int, int]:
        """Return the addresses of the first byte and after the last byte, for any strides."""
        geometry = self._geometry
        return self.address + geometry.low, self.address + geometry.high

    def bytes(self) -> memoryview:
        """Return the bytes of a row-major host tensor, valid while its owner lives."""
        if not self.nbytes:
            return memoryview(b"")
        return memoryview((ctypes.c_char * self.nbytes).from_address(self.address)).cast("B")

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} on {self.device}"


class Leaf(NamedTuple):
    """A named tensor of a container; ``role`` is its use in a module.

    ``persistent`` is False for a buffer that is not in the module's state dict.
    """

    name: str
    spec: TensorSpec
    role: Role = "weight"
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class Opaque:
    """A named tensor that cannot be described, and the error; harmless if it is skipped."""

    name: str
    error: FastemaError
    role: Role
    persistent: bool


class StateEntry(NamedTuple):
    """An entry of a container's state.

    Attributes
    ----------
    name : str
        Its name among the leaves; its key if it is not one of them.
    key : str
        Its key in the state of the model without wrappers.
    value : tensor or object
    """

    name: str
    key: str
    value: Any


class TensorContainer(NamedTuple):
    """A container of tensors, or of other containers, whose entries must stay the same objects.

    ``keys`` are the entries to compare in a dict or :class:`Attributes`; None compares all, in
    order. ``transient`` are the keys of tensors (or of None in their place) that are not in the
    module's state dict.
    """

    container: Any
    keys: tuple[str, ...] | None = None
    transient: frozenset[str] = frozenset()


class Attributes:
    """Access to an object's ``__dict__`` without keeping the object alive."""

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)

    @property
    def owner(self) -> Any:
        """The object; None once it is gone."""
        return self._owner()

    @property
    def values(self) -> dict[str, Any]:
        """The object's ``__dict__``; empty once the object is gone."""
        owner = self._owner()
        return {} if owner is None else vars(owner)


class Ranks(Protocol):
    """The processes that hold parts of the same tensors."""

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any of the processes."""

    def compare(self, facts: Mapping[str, str]) -> None:
        """Raise a LayoutError on every process unless all have the same facts."""


class Structure(Protocol):
    """Structure of a container, without its tensors."""

    def flatten(self, container: Any, *, write: bool = False) -> Sequence[Any] | None:
        """Return a container's tensors, ready for writing if ``write``; None if it differs."""

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """Return a new container of other tensors; raise a BridgeError if none can be created."""


@dataclass(frozen=True, slots=True)
class Leaves:
    """All tensors of a container, and what is needed to detect that they were replaced or moved.

    ``items`` are in the container's order, with tied weights of a module under every name.
    ``describe`` returns the current spec of an owner. ``held`` are the containers to watch.
    ``opaque`` are tensors that cannot be described. ``structure`` is None if only the container
    knows it (a torch module). ``moving`` is True if a framework moves tensors at every step, so
    that they have to be located at every call. ``parameters`` are the names of a torch module's
    parameters in the order of ``parameters()``; None if the container has no such list.
    """

    items: Sequence[Leaf]
    describe: Callable[[Any], TensorSpec]
    held: Sequence[TensorContainer] = ()
    opaque: Sequence[Opaque] = ()
    structure: Structure | None = None
    moving: bool = False
    parameters: Sequence[str] | None = None

    @property
    def names(self) -> list[str]:
        """The names of ``items``, in order."""
        return [leaf.name for leaf in self.items]

    @property
    def roles(self) -> dict[str, Role]:
        """The roles of all tensors by name, including opaque ones."""
        everything: list[Leaf | Opaque] = [*self.items, *self.opaque]
        return {one.name: one.role for one in everything}

    def select_names(self, names: Container[str]) -> Leaves:
        """Return the leaves with these names, in the same containers."""
        kept = [leaf for leaf in self.items if leaf.name in names]
        return Leaves(kept, self.describe, self.held)

    def refuse_opaque(self) -> None:
        """Raise the error of the first opaque tensor, if there is one."""
        for one in self.opaque:
            raise one.error
