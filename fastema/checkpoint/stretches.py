"""Where the row-major bytes of a tensor lie in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stretches"]


class Stretches:
    """The byte ranges of files that hold a tensor's data, in row-major order.

    Parameters
    ----------
    paths : list of Path
        The files.
    table : function
        Returns ``int64[stretches, 3]``, sorted by the last column: the file's index in ``paths``,
        the first byte in the file, and the first byte in the tensor. Called on first use.
    """

    def __init__(self, paths: list[Path], table: Callable[[], NDArray[np.int64]]) -> None:
        self.paths, self._table = paths, table
        self._found: NDArray[np.int64] | None = None

    @classmethod
    def whole(cls, path: Path, offset: int) -> Stretches:
        """Return the stretches of a tensor that is contiguous in one file."""
        found = np.array([[0, offset, 0]], np.int64)
        return cls([path], lambda: found)

    def within(self, first: int, count: int) -> Iterator[tuple[Path, int, int, int]]:
        """Yield path, offset in the file, offset in the buffer and length for a byte range."""
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
            yield self.paths[place], offset + skip, at, size
            at, row = at + size, row + 1
