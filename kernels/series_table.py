"""The contract between the host and the kernels of whole series.

A series is cut into rows, which threads take from one cursor. Table, ``int64[rows, COLUMNS]``:

===========  ====================================================================================
``SRC``      address of the row's first value
``PREV``     address of the ``size`` values before it, zeros where there were none
``DST``      address of the row's first result
``COUNT``    values in the row
``SEEN``     values before the row that are in its first window, at most ``size``
``ODD``      output: 1 if any result is not finite, otherwise 0
===========  ====================================================================================

Control, ``int64[CONTROLS]``: ``NEXT``, the next row to take; ``SIZE``, the size of the window;
``DIVIDE``, 1 to divide sums by their number of values; ``ENTERED``, the number of threads that have
started; ``PLACES``, the number of threads with scratch memory; ``ROOM``, its bytes per thread.
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
"""Running sums computed in parallel, since each addition waits for the one before."""

STRETCH: Final = 128
"""Values of a lane per pass of a sliding sum, so that intermediate results stay in the cache."""


def scratch_numbers(size: int) -> int:
    """Return the number of float64 of scratch that a thread needs for a window of ``size``."""
    return max(2 * LANES * STRETCH, 2 * size)
