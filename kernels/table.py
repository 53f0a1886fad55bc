"""The contract between host and kernels: what a chunk table and its two blocks hold.

A kernel is called as ``kernel(table, rows, numbers, control)``: four integers; all but ``rows`` are
addresses. It takes rows from the table until none is left, so any number of threads
may run the same call at once, and a thread that comes late finds nothing to do.

Chunk table, ``int64[rows, COLUMNS]``:

===============  ==================================================================================
``DST``          address of the first element written (the average, for an update)
``SRC``          address of the first element read (the weights)
``COUNT``        elements in this row
``DST_STEP``     elements from one to the next on the written side (1 in flat tables)
``SRC_STEP``     the same on the other side
``AVERAGE``      which of the weights applies: averages updated together have one each
``INDEX``        index of the first element in its whole tensor, counted in row-major order, on
                 which random bits depend (0 where there are none)
``INDEX_STEP``   from the index of one element to that of the next
``INDEX_RUN``    elements, at least 1, after which the index jumps
``INDEX_JUMP``   from the index of one run's first element to that of the next
``KEY``          32 bits that tell this tensor from others, for random bits
``RESIDUAL``     address of the written side's companion, which lies as the written side does
``RING``         address of the first element in slot 0 of a ring, which lies so too
``RING_STRIDE``  bytes from one slot to the next
===============  ==================================================================================

Numbers, ``float64[...]``: by ``AVERAGE``, the weight ``w = 1 - decay`` of the new value (for a
windowed mean, how many values it is of).

Control, ``int64[CONTROLS]``:

===============  ==================================================================================
``NEXT``         the next row to take; every thread advances it atomically
``CLAIM``        rows taken at once, a divisor of their number: those that read the same chunk
``SEED, STEP``   what random bits depend on besides the place of the element
``RESULTS``      address of ``float64[rows, MEASURES]``, for kernels that measure
``WINDOW``       slots of the ring
``SLOT``         the slot that is overwritten
``TURN``         values that went into the ring so far, this update's included
===============  ==================================================================================

On a GPU the numbers, up to ``MAX_AVERAGES``, and what the control block has of the moment are
parameters of the kernel. Where a captured graph is to run the kernel again at later steps, they
are in device memory instead and advance there: the *clock*, ``int64[CLOCK_CELLS]``, which begins
like a control block. More averages than ``MAX_AVERAGES`` have several clocks, one after the other.

===============  ==================================================================================
``IDLE``         not 0 where nothing is to be done at this step (in the place of ``NEXT``)
``WEIGHTS``      the numbers, ``float64[MAX_AVERAGES]``
``DONE``         updates so far, those that had nothing to do included
``START``        updates before the averages begin
``EVERY``        work is done at every so many-th update
``TRIES``        calls so far, those that were left out included
``NOT_FINITE``   in the first clock, the latest call at which a weight was not finite
``SKIPPED``      calls that were left out for it
``TABLES``       for each of the averages, the address and the number of rows of the table of its
                 weights
===============  ==================================================================================

That table, ``float64[rows, WEIGHT_COLUMNS]``, is made by :mod:`fastema.engine.weight_table`:
``FIRST``, the first update of a piece, ``SCALE``, and from ``COEFFICIENTS`` on those of a
polynomial of ``DEGREE``.

Measures, per row: ``DISTANCE`` and ``SQUARE``, the sums of squares of weights minus average and of
the average after the update, and ``STILL``, the number of elements that did not change; a kernel
that only looks for what is not finite leaves its number in ``DISTANCE``.

Steps and counts are in elements of the kernel's formats (a complex number is two).

A table is of one *layout*: ``flat``, elements adjacent on both sides and, where random bits are
used, with indices that follow each other; or ``strided``, any steps. A row has no indices on both
sides of a multiple of ``2**32``.
"""

from __future__ import annotations

DST, SRC, COUNT, DST_STEP, SRC_STEP, AVERAGE = range(6)
INDEX, INDEX_STEP, INDEX_RUN, INDEX_JUMP, KEY = range(6, 11)
RESIDUAL, RING, RING_STRIDE = range(11, 14)
COLUMNS = 14

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

DISTANCE, SQUARE, STILL = range(3)
MEASURES = 3

CHUNK = 1 << 16
"""Most elements in one row: small enough that the threads finish together, large enough that the
atomic step on the control block (about 20 ns) is lost in the work."""

SHARED_CHUNK = 1 << 14
"""The same where several rows work on one chunk, which must stay in the second-level cache."""

GPU_THREADS = 256
"""Threads of a block on a GPU."""

GPU_CHUNKS = 1 << 12, 1 << 16
"""Elements in one row for a GPU, at least and at most. A block of threads takes a row: there should
be many more of them than run at a time (about a thousand), lest the last ones run alone."""

GPU_ROWS = 1 << 14
"""Rows that a GPU's table should have at least."""

BLOCK = 64
"""Elements in the inner loop of constant length: a whole number of cache lines for every dtype."""

LINE = 64
"""Bytes of a cache line."""

PREFETCH = 2048
"""Bytes a flat kernel asks for ahead of its loads. 1-2 KB measured level on an idle machine, 2 KB
up to 15 % better on a busy one; from 4 KB on it is slower."""
