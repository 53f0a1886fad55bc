"""Where the bytes of a tensor lie in files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastema.checkpoint.files import OpenFile, StoredTensor

__all__ = ["Contiguous", "Place", "Stretches", "Strided"]


class Place(Protocol):
    """Where a tensor's data lies."""

    @property
    def files(self) -> list[OpenFile]:
        """The files that hold it."""

    @property
    def origin(self) -> tuple[Any, ...]:
        """What tensors that share their memory have in common, besides dtype and shape."""

    def read(self, first: int, buffer: memoryview) -> None:
        """Fill the buffer with the tensor's row-major bytes from ``first`` on, on any thread."""


class Stretches:
    """The byte ranges of files that hold a tensor's data, in row-major order.

    Parameters
    ----------
    files : list of OpenFile
        The files.
    table : function
        Returns ``int64[stretches, 3]``, sorted by the last column: the file's index in ``files``,
        the first byte in the file, and the first byte in the tensor. Called on first use.
    """

    def __init__(self, files: list[OpenFile], table: Callable[[], NDArray[np.int64]]) -> None:
        self.files, self._table = files, table
        self._found: NDArray[np.int64] | None = None

    @property
    def origin(self) -> tuple[Any, ...]:
        """See :class:`Place`."""
        file, offset, _, _ = next(self.within(0, 1))
        return file.version, offset

    def read(self, first: int, buffer: memoryview) -> None:
        """See :class:`Place`."""
        for file, offset, begin, count in self.within(first, len(buffer)):
            file.read(offset, buffer[begin : begin + count])

    def within(self, first: int, count: int) -> Iterator[tuple[OpenFile, int, int, int]]:
        """Yield file, offset in the file, offset in the buffer and length for a byte range."""
        table: Any = self._found if self._found is not None else self._table()
        self._found = table
        begins = table[:, 2]
        row = int(np.searchsorted(begins, first, "right")) - 1
        at = 0
        while at < count:
            place, offset, begin = (int(one) for one in table[row])
            skip = first + at - begin
            end = int(begins[row + 1]) if row + 1 < len(begins) else first + count
            size = min(count - at, end - begin - skip)
            yield self.files[place], offset + skip, at, size
            at, row = at + size, row + 1


class Contiguous:
    """The place of a tensor whose row-major bytes follow each other in one file."""

    def __init__(self, file: OpenFile, offset: int) -> None:
        self.files, self._offset = [file], offset

    @property
    def origin(self) -> tuple[Any, ...]:
        """See :class:`Place`."""
        return self.files[0].version, self._offset

    def read(self, first: int, buffer: memoryview) -> None:
        """See :class:`Place`."""
        self.files[0].read(self._offset + first, buffer)


_BAND: Final = 1 << 22
"""Bytes of a strided tensor that are read together."""

_RUN: Final = 1 << 16
"""Bytes of a file that are read at once even if the tensor has only some of them."""


class Strided:
    """A tensor of ``torch.save`` that is not row-major: channels-last, transposed or expanded.

    It is read in bands of rows. Each file keeps its latest band, because tensors are read in small
    pieces, one after another.

    Parameters
    ----------
    file : OpenFile
        The file.
    offset : int
        The first byte in it.
    tensor : StoredTensor
        Dtype and shape.
    strides : tuple of int
        Strides in elements, at least 0.
    """

    def __init__(
        self, file: OpenFile, offset: int, tensor: StoredTensor, strides: tuple[int, ...]
    ) -> None:
        self.files = [file]
        self._size = tensor.kind.itemsize
        self._block = _Block(offset, tensor.shape, strides)

    @property
    def origin(self) -> tuple[Any, ...]:
        """See :class:`Place`."""
        return self.files[0].version, self._block

    def read(self, first: int, buffer: memoryview) -> None:
        """See :class:`Place`."""
        skip = first % self._size
        out = np.empty(-(-(skip + len(buffer)) // self._size), f"V{self._size}")
        self._gather(self._block, first // self._size, out)
        buffer[:] = out.view(np.uint8).data[skip : skip + len(buffer)]

    def _gather(self, block: _Block, first: int, out: NDArray[Any]) -> None:
        """Copy elements ``first, first + 1, ...`` of a block, in row-major order, to ``out``."""
        while len(out):
            row = math.prod(block.shape[1:])
            i, at = divmod(first, row)
            if row * self._size > _BAND:
                count = min(len(out), row - at)
                self._gather(block.row(i, self._size), at, out[:count])
            else:
                rows = max(_BAND // (row * self._size), 1)
                begin = i // rows * rows
                band = self._band(block.rows(begin, rows, self._size)).reshape(-1)
                at = first - begin * row
                count = min(len(out), len(band) - at)
                out[:count] = band[at : at + count]
            first, out = first + count, out[count:]

    def _band(self, block: _Block) -> NDArray[Any]:
        file = self.files[0]
        with file.lock:
            if file.kept[0] != (block, self._size):
                file.kept = (block, self._size), self._fetch(block)
            band: NDArray[Any] = file.kept[1]
            return band

    def _fetch(self, block: _Block) -> NDArray[Any]:
        """Read a block into a row-major array."""
        span, size = extent(block.shape, block.strides), self._size
        if span <= 2 * math.prod(block.shape) or span * size <= _RUN:
            memory = np.empty(span, f"V{size}")
            self.files[0].read(block.offset, memory.view(np.uint8).data)
            strides = [stride * size for stride in block.strides]
            return np.lib.stride_tricks.as_strided(memory, block.shape, strides).copy()
        axis = max(range(len(block.shape)), key=lambda k: block.strides[k] * (block.shape[k] > 1))
        parts = [self._fetch(block.row(i, size, axis)) for i in range(block.shape[axis])]
        return np.stack(parts, axis)


class _Block(NamedTuple):
    """A block of a strided tensor: its first byte in the file, shape, and strides in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def row(self, i: int, size: int, axis: int = 0) -> _Block:
        """Return the block at an index of an axis, without that axis."""
        return _Block(
            self.offset + i * self.strides[axis] * size,
            self.shape[:axis] + self.shape[axis + 1 :],
            self.strides[:axis] + self.strides[axis + 1 :],
        )

    def rows(self, first: int, count: int, size: int) -> _Block:
        """Return up to ``count`` rows, from ``first`` on."""
        if not self.shape:
            return self
        count = min(count, self.shape[0] - first)
        offset = self.offset + first * self.strides[0] * size
        return _Block(offset, (count, *self.shape[1:]), self.strides)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the elements of memory that a tensor of these strides spans."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
