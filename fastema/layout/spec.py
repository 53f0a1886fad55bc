"""What the rest of fastema knows of a tensor: where its elements lie, and who owns them."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from fastema.errors import FastemaError
from fastema.layout.dtypes import DType, dtype
from fastema.layout.home import Home

__all__ = ["Leaf", "Leaves", "Opaque", "Role", "Structure", "TensorSpec"]

Role = Literal["weight", "frozen", "buffer"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor in memory.

    Attributes
    ----------
    address : int
        Of the first element, in bytes.
    shape, strides : tuple of int
        In elements.
    dtype : str
        A code of :data:`fastema.layout.dtypes.DTYPES`.
    device : str
        ``"cpu"``, ``"cuda:0"``, ...
    writable : bool
        Whether the framework allows writing.
    owner : object
        Keeps the memory alive; not compared.
    exchange : int
        Address of the owner's DLPack exchange function, 0 where it has none; not compared.
    home : Home, optional
        The device, where it is not the host; not compared.
    glance : callable, optional
        ``owner -> object`` that is another once any of the above is, cheaper than describing it
        again; not compared.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str
    writable: bool = True
    owner: Any = field(default=None, compare=False, repr=False)
    exchange: int = field(default=0, compare=False, repr=False)
    home: Home | None = field(default=None, compare=False, repr=False)
    glance: Callable[[Any], object] | None = field(default=None, compare=False, repr=False)

    def kept_by(self, owner: Any) -> TensorSpec:
        """The same with another owner."""
        return replace(self, owner=owner)

    def at(self, address: int) -> TensorSpec:
        """The same elsewhere."""
        return replace(self, address=address)

    @property
    def kind(self) -> DType:
        """The dtype's row in the table."""
        return dtype(self.dtype)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.kind.itemsize

    def axes(self) -> list[tuple[int, int]]:
        """(extent, stride) of every axis longer than one, outermost in memory first."""
        kept = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n != 1]
        return sorted(kept, key=lambda axis: -abs(axis[1]))

    @property
    def dense(self) -> bool:
        """Whether the elements fill one stretch of memory, in whatever order of axes."""
        expected = 1
        for extent, stride in reversed(self.axes()):
            if stride != expected:
                return False
            expected *= extent
        return True

    @property
    def overlaps_itself(self) -> bool:
        """Whether several indices may share an element: stride 0, or strides within each other."""
        reach = 0
        for extent, stride in reversed(self.axes()):
            if abs(stride) <= reach:
                return self.size > 0
            reach += (extent - 1) * abs(stride)
        return False

    def span(self) -> tuple[int, int]:
        """First byte and the byte after the last, whatever the strides; empty if no element."""
        if not self.size:
            return self.address, self.address
        reach = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
        itemsize = self.kind.itemsize
        return self.address + low * itemsize, self.address + (high + 1) * itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} on {self.device}"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A named tensor of a container; ``role`` says what a module uses it for."""

    name: str
    spec: TensorSpec
    role: Role = "weight"


@dataclass(frozen=True, slots=True)
class Opaque:
    """A named tensor that cannot be described, and why; no harm where it is skipped."""

    name: str
    error: FastemaError
    role: Role


class Structure(Protocol):
    """How a container holds its tensors, without the tensors."""

    def flatten(self, container: Any, *, write: bool = False) -> Sequence[Any] | None:
        """The tensors of a container, in the leaves' order; None if it is built in another way.

        ``write`` says that they are about to be written.
        """

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """A new container that holds other tensors.

        Raises
        ------
        BridgeError
            If there can be only one of it.
        """


@dataclass(frozen=True, slots=True)
class Leaves:
    """All tensors of a container, and how to notice that they are no longer the same.

    Attributes
    ----------
    items : list of Leaf
        In the container's order. Tied weights of a module appear under every name.
    describe : callable
        ``owner -> TensorSpec``, as it is now.
    held : list of containers
        Dicts, mappings and lists through which the tensors are held; their entries must stay the
        same objects in the same order.
    opaque : list of Opaque
        Tensors without a description.
    structure : Structure, optional
        How the container holds them; None where only its owner knows (a torch module).
    moving : bool
        Whether some are of a framework whose tensors lie elsewhere after every step, so that they
        are looked up at every call.
    """

    items: Sequence[Leaf]
    describe: Callable[[Any], TensorSpec]
    held: Sequence[Any] = ()
    opaque: Sequence[Opaque] = ()
    structure: Structure | None = None
    moving: bool = False

    @property
    def names(self) -> list[str]:
        """The names in order."""
        return [leaf.name for leaf in self.items]

    @property
    def roles(self) -> dict[str, Role]:
        """What every tensor is used for, by name; of those without a description too."""
        items: dict[str, Role] = {leaf.name: leaf.role for leaf in self.items}
        return {**items, **{one.name: one.role for one in self.opaque}}

    def only(self, names: Container[str]) -> Leaves:
        """The leaves of these names, in the same containers."""
        kept = [leaf for leaf in self.items if leaf.name in names]
        return Leaves(kept, self.describe, self.held)

    def refuse_opaque(self) -> None:
        """Raise what is wrong with the first tensor that cannot be described."""
        for one in self.opaque:
            raise one.error
