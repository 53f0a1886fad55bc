"""The contract between host and kernels: the contents of a chunk table and its two blocks.

A kernel is called as ``kernel(table, rows, numbers, control)``: four integers, all addresses but
``rows``. It takes rows from the table until none is left, so any number of threads may run the same
call at once, and a thread that starts late finds nothing to do.

Chunk table, ``int64[rows, COLUMNS]``:

===============  ==================================================================================
``DST``          address of the first element written (the average, for an update)
``SRC``          address of the first element read (the weights)
``COUNT``        elements in this row
``AVERAGE``      index of the average, and so of its weight, among those updated together
``KEY``          32 bits that identify the tensor, for random bits
``INDEX``        index of the first element in its whole tensor, in row-major order; random bits
                 depend on it (0 without random bits)
``DST_STEP``     step between elements on the written side (1 in flat tables)
``SRC_STEP``     step between elements on the other side
``INDEX_STEP``   difference between the indices of adjacent elements
``INDEX_RUN``    number of elements, at least 1, after which the index jumps
``INDEX_JUMP``   difference between the indices of the first elements of adjacent runs
``RESIDUAL``     address of the written side's residual, which has the same strides
``RING``         address of the first element in slot 0 of a ring, with the same strides
``RING_STRIDE``  bytes from one slot to the next
===============  ==================================================================================

The columns that every row of a flat table needs come first, and a row fills whole cache lines, so
that a GPU fetches them at once.

Numbers, ``float64[...]``: by ``AVERAGE``, the weight ``w = 1 - decay`` of the new value (for a
windowed mean, the number of its values).

Control, ``int64[CONTROLS]``:

===============  ==================================================================================
``NEXT``         the next row to take; every thread advances it atomically
``CLAIM``        rows taken at once, which read the same chunk; it divides the number of rows
``SEED, STEP``   random bits depend on these and on the index of the element
``RESULTS``      address of ``float64[rows]``, for kernels that count elements
``WINDOW``       slots of the ring
``SLOT``         the slot that is overwritten
``TURN``         number of values put into the ring so far, including this update's
===============  ==================================================================================

On a GPU the numbers, up to ``MAX_AVERAGES``, and the changing cells of the control block are kernel
parameters. For a captured graph, which runs the kernel again at later steps, they are in device
memory instead and advance there. This step counter is the *clock*, ``int64[CLOCK_CELLS]``, which
begins like a control block. More averages than ``MAX_AVERAGES`` have several adjacent clocks.

===============  ==================================================================================
``IDLE``         not 0 if there is nothing to do at this step (in the cell of ``NEXT``)
``WEIGHTS``      the numbers, ``float64[MAX_AVERAGES]``
``DONE``         number of updates so far, including those with nothing to do
``START``        number of the update at which the averages begin
``EVERY``        number of updates from one that changes the averages to the next
``TRIES``        number of calls so far, including skipped calls
``NOT_FINITE``   in the first clock, the latest call at which a weight was not finite
``SKIPPED``      number of calls skipped because a weight was not finite
``TABLES``       for each average, the address and the number of rows of its weight table
===============  ==================================================================================

:mod:`fastema.engine.weight_table` builds the weight table, ``float64[rows, WEIGHT_COLUMNS]``:
``FIRST``, the first update of a piece, ``SCALE``, and from column ``COEFFICIENTS`` on the
coefficients of a polynomial of degree ``DEGREE``.

Steps and counts are in elements of the kernel's formats (a complex number is two).

A table has one *layout*. In a ``flat`` table elements are adjacent on both sides and, if random
bits are used, have consecutive indices; a ``strided`` table has any steps. The indices of a row
never cross a multiple of ``2**32``.
"""

from __future__ import annotations

DST, SRC, COUNT, AVERAGE, KEY, INDEX = range(6)
DST_STEP, SRC_STEP, INDEX_STEP, INDEX_RUN, INDEX_JUMP = range(6, 11)
RESIDUAL, RING, RING_STRIDE = range(11, 14)
COLUMNS = 16

NEXT, CLAIM, SEED, STEP, RESULTS, WINDOW, SLOT, TURN = range(8)
CONTROLS = 8

IDLE = NEXT
MAX_AVERAGES = 8
WEIGHTS = CONTROLS
DONE, START, EVERY, TRIES, NOT_FINITE, SKIPPED, TABLES = range(
    WEIGHTS + MAX_AVERAGES, WEIGHTS + MAX_AVERAGES + 7
)
CLOCK_CELLS = TABLES + 2 * MAX_AVERAGES

FIRST, SCALE, COEFFICIENTS = range(3)
DEGREE = 11
WEIGHT_COLUMNS = COEFFICIENTS + DEGREE + 1

CHUNK = 1 << 16
"""Most elements in one row: few enough that threads finish together, many enough that the atomic
addition to the control block (about 20 ns) is negligible."""

SHARED_CHUNK = 1 << 14
"""Most elements in one row if several rows share a chunk, which must stay in the L2 cache."""

GPU_THREADS = 256
"""Threads per block on a GPU."""

GPU_CHUNKS = 1 << 12, 1 << 16
"""Least and most elements in one row for a GPU. Each block of threads takes a row; there should be
many more blocks than run at a time (about a thousand), so that the last ones do not run alone."""

GPU_ROWS = 1 << 14
"""Number of rows that a GPU's table should have at least."""

BLOCK = 64
"""Elements in the inner loop of constant length: a whole number of cache lines for every dtype."""

LINE = 64
"""Bytes of a cache line."""

PREFETCH = 2048
"""Bytes by which a flat kernel of 16-bit averages prefetches ahead of its loads. 1-2 KB measured
the same on an idle machine, 2 KB up to 15 % better on a busy one; from 4 KB on it is slower."""
