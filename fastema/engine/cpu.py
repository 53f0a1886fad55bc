"""CPU launches: serial kernels that release the GIL, on a small thread pool of the library's own.

Numba's parallel layers abort when two Python threads enter them, and are killed or hang after a
fork. Here every thread of a launch runs the same serial kernel and takes rows from one shared
cursor. This balances the work however large the tensors are, and a thread that starts late finds
nothing left to do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from fastema.engine.interrupts import defer_signals
from fastema.engine.registry import Kernel
from fastema.errors import ArgumentError

__all__ = ["get_num_threads", "launch", "set_num_threads"]

BYTES_PER_THREAD: Final = 8 << 20
"""Minimum work per thread: waking a helper takes 20-200 microseconds, in which a core moves 1-8 MB.
Smaller launches stay on the calling thread."""


MOST_THREADS: Final = 32
"""Default limit. A few cores saturate a memory controller, and each helper costs a wake-up."""


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Pool:
    """Helper threads beside the calling thread, started on first use."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.lock = threading.Lock()
        self.executor: ThreadPoolExecutor | None = None

    def submit(self, helpers: int, task: Callable[..., object], *args: int) -> list[Future[object]]:
        """Submit a task to helpers; return fewer futures, or none, if no thread can be started."""
        futures: list[Future[object]] = []
        with self.lock:
            if self.executor is None:
                self.executor = ThreadPoolExecutor(self.threads - 1, "fastema-run")
            try:
                for _ in range(helpers):
                    futures.append(self.executor.submit(task, *args))  # noqa: PERF401 (keeps those)
            except RuntimeError:
                # The last task was queued anyway, and its table may be freed before a thread runs
                # it: drop the queue. (At interpreter shutdown nothing was queued.)
                self.executor.shutdown(wait=False, cancel_futures=True)
                self.executor = None
        return futures

    def close(self) -> None:
        with self.lock:
            if self.executor is not None:
                self.executor.shutdown(wait=False)
            self.executor = None


_pool = _Pool(min(_cores(), MOST_THREADS))


def _after_fork() -> None:
    # The parent's threads do not exist in the child, and one of them may have held a lock.
    global _pool
    _pool = _Pool(_pool.threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def set_num_threads(threads: int) -> None:
    """Limit the number of threads that an update uses, including the calling thread.

    Parameters
    ----------
    threads : int
        From 1 to 1024. The default is the number of cores the process may run on, at most 32.

    Raises
    ------
    ArgumentError
        If ``threads`` is not such a number.
    """
    global _pool
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ArgumentError(f"threads={threads!r}: expected a whole number from 1 to 1024")
    before, _pool = _pool, _Pool(threads)
    before.close()


def get_num_threads() -> int:
    """Return the most threads that an update uses, including the calling thread."""
    return _pool.threads


def launch(kernel: Kernel, table: int, rows: int, numbers: int, control: int, nbytes: int) -> None:
    """Run a kernel over a table, on as many threads as ``nbytes`` justifies.

    All threads have left the kernel when this returns. Signals are deferred until then.
    """
    pool = _pool
    helpers = min(pool.threads, nbytes // BYTES_PER_THREAD, rows) - 1
    if helpers < 1:
        kernel(table, rows, numbers, control)
        return
    with defer_signals():
        futures = pool.submit(helpers, kernel, table, rows, numbers, control)
        kernel(table, rows, numbers, control)
        for future in futures:
            if not future.cancel():
                future.result()
