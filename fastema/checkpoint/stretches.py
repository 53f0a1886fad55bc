"""Where the bytes of a tensor lie in files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastema.checkpoint.files import OpenFile, StoredTensor

__all__ = ["Place", "Stretches", "Strided"]


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

    @classmethod
    def whole(cls, file: OpenFile, offset: int) -> Stretches:
        """Return the stretches of a tensor that is contiguous in one file."""
        found = np.array([[0, offset, 0]], np.int64)
        return cls([file], lambda: found)

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


class Strided:
    """A tensor of ``torch.save`` that is not row-major: channels-last, transposed or expanded.

    Its part of the file is read whole, and the last one of each file is kept, since tensors are
    read piece by piece.

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
        self._offset, self._tensor, self._strides = offset, tensor, strides

    @property
    def origin(self) -> tuple[Any, ...]:
        """See :class:`Place`."""
        return self.files[0].version, self._offset, self._strides

    def read(self, first: int, buffer: memoryview) -> None:
        """See :class:`Place`."""
        size = self._tensor.kind.itemsize
        skip = first % size
        elements = np.empty(-(-(skip + len(buffer)) // size), f"V{size}")
        if len(elements):
            _gather(self._view(), first // size, elements)
        buffer[:] = elements.view(np.uint8).data[skip : skip + len(buffer)]

    def _view(self) -> NDArray[Any]:
        file, size = self.files[0], self._tensor.kind.itemsize
        with file.lock:
            if file.kept[0] is not self:
                memory = np.empty(extent(self._tensor.shape, self._strides), f"V{size}")
                file.read(self._offset, memory.view(np.uint8).data)
                file.kept = self, memory
            memory = file.kept[1]
        strides = [stride * size for stride in self._strides]
        return np.lib.stride_tricks.as_strided(memory, self._tensor.shape, strides)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the elements of memory that a tensor of these strides spans."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _gather(view: NDArray[Any], first: int, out: NDArray[Any]) -> None:
    """Copy elements ``first, first + 1, ...`` of a view, in row-major order, to ``out``."""
    if view.ndim < 2:
        out[:] = view.reshape(-1)[first : first + len(out)]
        return
    row = math.prod(view.shape[1:])
    begin, end = -(-first // row), (first + len(out)) // row  # whole rows
    if begin > end:
        _gather(view[end], first - end * row, out)
        return
    head, tail = begin * row - first, end * row - first
    if head:
        _gather(view[begin - 1], first - (begin - 1) * row, out[:head])
    out[head:tail].reshape(end - begin, *view.shape[1:])[...] = view[begin:end]
    if tail < len(out):
        _gather(view[end], 0, out[tail:])
