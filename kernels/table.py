"""The contract between host and kernels: what a chunk table and a scalar block hold.

A kernel is called as ``kernel(table, rows, scalars, cursor)``: four integers, of which ``table``,
``scalars`` and ``cursor`` are addresses. It takes rows from the table until none is left, so any
number of threads may run the same call at once, and a call that was cut short is finished by
making it again.

Chunk table, ``int64[rows, COLUMNS]``:

=============  =====================================================================
``DST``        address of the first element written (the average, for an update)
``SRC``        address of the first element read (the weights)
``COUNT``      elements in this row
``DST_STEP``   elements from one to the next on the written side (1 in flat tables)
``SRC_STEP``   the same on the other side
=============  =====================================================================

Scalar block, ``float64[SCALARS]``: ``WEIGHT`` is the weight ``w = 1 - decay`` of the new value.
Strides and counts are in elements of the kernel's formats (a complex number is two).

Cursor, ``int64[1]``: the next row to take; every thread advances it atomically.
"""

from __future__ import annotations

from typing import Final

DST: Final = 0
SRC: Final = 1
COUNT: Final = 2
DST_STEP: Final = 3
SRC_STEP: Final = 4
COLUMNS: Final = 5

WEIGHT: Final = 0
SCALARS: Final = 1

CHUNK: Final = 1 << 16
"""Most elements in one row: small enough that the threads finish together, large enough that the
atomic step on the cursor (about 20 ns) is lost in the work."""

BLOCK: Final = 64
"""Elements in the inner loop of constant length: a whole number of cache lines for every dtype."""

PREFETCH: Final = 1024
"""Bytes a flat kernel asks for ahead of its loads. 1-2 KB measured level, 4 KB slower."""
