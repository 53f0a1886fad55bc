"""The contract between the host and a native run: the steps, launches and threads of one call.

Run, ``int64[WORDS]``:

================  =================================================================================
``WATCHES``       number of checks before the run; at ``WATCHES_AT`` the addresses of their tasks
``CHECK``         address of the function ``check_tensors``
``LAUNCHES``      number of launches; ``LAUNCHES_AT`` is the address of their table
``STEPS``         number of steps in the table of steps, at ``STEPS_AT``; if that is 0, there is no
                  table: the control blocks and ``NUMBERS`` are complete
``STEP_WORDS``    number of words in a row of the table of steps
``CURSOR``        number of steps done so far
``FIRST``         how many of them came before the table's first step
``ADVANCE``       by how much a run moves the cursor, after its last launch: 1, or 0 to repeat
``SEED``          random bits depend on this
``NUMBERS``       address of the numbers of this run, see :mod:`fastema.kernels.table`
``THREADS``       most threads that the work justifies on an OpenMP team, which is awake
``POOL_THREADS``  the same for threads that must be woken
``ENTERED``       the number of threads that have begun this run
``LIMIT``         the number of threads that take part in it
``TEAM``          address of the process' threads, ``int64[TEAM_WORDS]``
``SELF``          address of the function ``run_launches``, which the threads call
``SAVE``          address of ``PyEval_SaveThread``, or 0 to keep the GIL; ``RESTORE`` belongs to it
================  =================================================================================

A launch is ``int64[LAUNCH]``: addresses of the kernel, of its table, the number of rows, and the
address of its control block. A step is ``int64[STEP_WORDS]``: ``DUE``, 0 if this step changes
nothing, ``STEP``, ``WINDOW``, ``SLOT`` and ``TURN`` as in a control block, and the numbers.

Team, ``int64[TEAM_WORDS]``:

================  =================================================================================
``PARALLEL``      address of ``GOMP_parallel``, or 0 if no OpenMP is loaded
``SIZE``          address of a function that returns how many threads the framework uses
``MOST``          the limit that the user has set, or 0
``POOL``          threads in the pool of our own, the calling thread included
================  =================================================================================
"""

from __future__ import annotations

WATCHES, WATCHES_AT, CHECK, LAUNCHES, LAUNCHES_AT = range(5)
STEPS, STEPS_AT, STEP_WORDS, CURSOR, FIRST, ADVANCE = range(5, 11)
SEED, NUMBERS, THREADS, POOL_THREADS, ENTERED, LIMIT, TEAM = range(11, 18)
SELF, SAVE, RESTORE = range(18, 21)
WORDS = 21

KERNEL, TABLE, ROWS, CONTROL = range(4)
LAUNCH = 4

DUE, STEP, WINDOW, SLOT, TURN, FIRST_NUMBER = range(6)

PARALLEL, SIZE, MOST, POOL = range(4)
TEAM_WORDS = 4

DONE, MOVED, NO_STEP, NEEDS_POOL = range(4)
"""What a run returns: done; nothing done, since a tensor has moved, or there is no further step;
all is ready for threads of the pool, which call ``SELF``."""
