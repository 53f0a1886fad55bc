"""Descriptions of tensors: where their elements lie, and who owns them."""

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
    "Division",
    "Leaf",
    "Leaves",
    "Opaque",
    "Ranks",
    "Role",
    "Structure",
    "TensorContainer",
    "TensorSpec",
]

Role = Literal["weight", "frozen", "buffer"]


class _Geometry(NamedTuple):
    """Properties of a tensor that follow from shape, strides and dtype alone."""

    size: int
    nbytes: int
    dense: bool
    overlaps_itself: bool
    low: int  # first byte, counted from the address of the first element
    high: int  # byte after the last


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


class Division(Protocol):
    """Division of a tensor among processes; two are equal on all of them or on none."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of those that hold the same part."""

    def tensor(self, array: Any) -> Any:
        """Make this process's part, in whatever memory, a tensor that is divided in this way."""

    def stacked(self, count: int) -> Division:
        """The division of that many such tensors along a new first axis."""


# Not frozen: that would make it take five times as long to make one, and every tensor has several.
@dataclass(unsafe_hash=True, slots=True)
class TensorSpec:
    """A tensor in memory; never changed. Fields from the owner on are not compared.

    Attributes
    ----------
    address : of the first element, in bytes
    strides : in elements
    dtype : a code of :data:`fastema.layout.dtypes.DTYPES`
    writable : whether the framework allows writing
    whole, offset : of a part (a shard), the whole's shape and the index of the first element in it
    owner : keeps the memory alive
    exchange : address of the DLPack exchange function of the tensor's class; 0 without one
    context : the device, where it is not the host
    fingerprint : ``owner -> object``, another once any of the above is; cheaper than describing
    wrapped : ``owner -> tensor`` that lies there, where the owner is only a wrapper
    division : how the tensor is divided among processes, also where this one has all of it
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
    wrapped: Callable[[Any], Any] | None = field(default=None, compare=False, repr=False)
    division: Division | None = field(default=None, compare=False, repr=False)

    def with_owner(self, owner: Any) -> TensorSpec:
        """The same with another owner."""
        return replace(self, owner=owner)

    def at(self, address: int) -> TensorSpec:
        """The same elsewhere."""
        return replace(self, address=address)

    def part(
        self, owner: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> TensorSpec:
        """A tensor within this one, of the same framework; all counts are in elements."""
        return TensorSpec(
            self.address + offset * self.kind.itemsize,
            *(shape, strides, self.dtype, self.device, self.writable),
            owner=owner,
            exchange=self.exchange,
            context=self.context,
            fingerprint=self.fingerprint,
        )

    def divided_like(self, other: TensorSpec) -> TensorSpec:
        """The same memory as the part of a whole that another tensor of its shape is.

        A ring's slots, which lie before the other axes, are not divided.
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
        """The owner, or what it wraps."""
        return self.owner if self.wrapped is None else self.wrapped(self.owner)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.shape if self.whole is None else self.whole

    @property
    def kind(self) -> DType:
        """The dtype's row in the table."""
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
        """Whether the elements fill one stretch of memory, in whatever order of axes."""
        return self._geometry.dense

    @property
    def overlaps_itself(self) -> bool:
        """Whether several indices may share an element: stride 0, or strides within each other."""
        return self._geometry.overlaps_itself

    def span(self) -> tuple[int, int]:
        """First byte and the byte after the last, whatever the strides; empty if no element."""
        geometry = self._geometry
        return self.address + geometry.low, self.address + geometry.high

    def bytes(self) -> memoryview:
        """The bytes of a row-major tensor on the host, for as long as its owner is kept."""
        if not self.nbytes:
            return memoryview(b"")
        return memoryview((ctypes.c_char * self.nbytes).from_address(self.address)).cast("B")

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} on {self.device}"


class Leaf(NamedTuple):
    """A named tensor of a container; ``role`` says what a module uses it for.

    ``persistent`` is False for a buffer that the module's own state leaves out.
    """

    name: str
    spec: TensorSpec
    role: Role = "weight"
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class Opaque:
    """A named tensor that cannot be described, and why; no harm where it is skipped."""

    name: str
    error: FastemaError
    role: Role
    persistent: bool = True


class TensorContainer(NamedTuple):
    """A container through which tensors are held: its entries must stay the same objects.

    Of a dict, or of :class:`Attributes`, the ``keys`` count, whatever else it holds; by default all
    of them, in the same order. ``transient`` are those of tensors that the state of a module leaves
    out, or of None in their place.
    """

    container: Any
    keys: tuple[str, ...] | None = None
    transient: frozenset[str] = frozenset()


class Attributes:
    """An object's ``__dict__``, without keeping the object alive."""

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)

    def get(self, name: str) -> Any:
        """One of them; None where there is none, or where the object is gone."""
        owner = self._owner()
        return None if owner is None else vars(owner).get(name)


class Ranks(Protocol):
    """The processes that hold parts of the same tensors."""

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any of them."""

    def compare(self, facts: Mapping[str, str]) -> None:
        """Raise a LayoutError on every process, if one has other facts than the first."""


class Structure(Protocol):
    """The structure of a container, without its tensors."""

    def flatten(self, container: Any, *, write: bool = False) -> Sequence[Any] | None:
        """The tensors of a container, about to be written or not; None if it is built otherwise."""

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """A new container that holds other tensors; a BridgeError if there can be only one."""


@dataclass(frozen=True, slots=True)
class Leaves:
    """All tensors of a container, and how to notice that they are no longer the same.

    ``items`` are in the container's order, tied weights of a module under every name. ``describe``
    says where an owner's tensor is now. ``structure`` is None where only the owner of the container
    knows it (a torch module). ``moving`` says that some are of a framework whose tensors lie
    elsewhere after every step, so that they are looked up at every call.
    """

    items: Sequence[Leaf]
    describe: Callable[[Any], TensorSpec]
    held: Sequence[TensorContainer] = ()
    opaque: Sequence[Opaque] = ()
    structure: Structure | None = None
    moving: bool = False

    @property
    def names(self) -> list[str]:
        """The names in order."""
        return [leaf.name for leaf in self.items]

    @property
    def roles(self) -> dict[str, Role]:
        """Roles of all tensors by name, also of those without a description."""
        everything: list[Leaf | Opaque] = [*self.items, *self.opaque]
        return {one.name: one.role for one in everything}

    def only(self, names: Container[str]) -> Leaves:
        """The leaves of these names, in the same containers."""
        kept = [leaf for leaf in self.items if leaf.name in names]
        return Leaves(kept, self.describe, self.held)

    def refuse_opaque(self) -> None:
        """Raise what is wrong with the first tensor that cannot be described."""
        for one in self.opaque:
            raise one.error
