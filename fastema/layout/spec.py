"""What the rest of fastema knows of a tensor: where its elements lie, and who owns them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastema.layout.dtypes import DType, dtype

__all__ = ["Leaf", "Leaves", "Role", "TensorSpec"]

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
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str
    writable: bool = True
    owner: Any = field(default=None, compare=False, repr=False)

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
class Leaves:
    """All tensors of a container, and how to notice that they are no longer the same.

    Attributes
    ----------
    items : list of Leaf
        In the container's order, every name once.
    describe : callable
        ``owner -> TensorSpec``, as it is now.
    exchange : int
        Address of the owners' DLPack exchange function, 0 where they have none in common.
    dicts : list of dict
        Those through which the container holds its tensors; their entries must stay the same
        objects in the same order.
    """

    items: Sequence[Leaf]
    describe: Callable[[Any], TensorSpec]
    exchange: int = 0
    dicts: Sequence[dict[Any, Any]] = ()

    @property
    def names(self) -> list[str]:
        """The names in order."""
        return [leaf.name for leaf in self.items]
