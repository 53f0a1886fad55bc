"""The contract between host and the kernels of whole series.

A series is cut into rows, which threads take from one cursor. Table, ``int64[rows, COLUMNS]``:

===========  ====================================================================================
``SRC``      address of the row's first value
``PREV``     address of the ``size`` values before it, zeros where there were none
``DST``      address of the row's first result
``COUNT``    values in the row
``SEEN``     values before the row, as far as they are in its first window: at most ``size``
``ODD``      written: 1 where a result is not finite, else 0
===========  ====================================================================================

Control, ``int64[CONTROLS]``: ``NEXT``, the next row to take; ``SIZE``, that of the window;
``DIVIDE``, 1 where sums are to be divided by how many values they are of; ``ENTERED``, threads that
have begun, and ``PLACES``, how many of them there is room for; ``ROOM``, bytes of each.
"""

from __future__ import annotations

from typing import Final

SRC: Final = 0
PREV: Final = 1
DST: Final = 2
COUNT: Final = 3
SEEN: Final = 4
ODD: Final = 5
COLUMNS: Final = 6

NEXT: Final = 0
SIZE: Final = 1
DIVIDE: Final = 2
ENTERED: Final = 3
PLACES: Final = 4
ROOM: Final = 5
CONTROLS: Final = 6

LANES: Final = 4
"""Running sums that are worked on at a time, since each waits for its last addition."""

STRETCH: Final = 128
"""Values of a lane worked on in turn where sums slide: what is between stays in the cache."""


def scratch_numbers(size: int) -> int:
    """Return how many float64 of scratch a thread needs for a window of ``size``."""
    return max(2 * LANES * STRETCH, 2 * size)
