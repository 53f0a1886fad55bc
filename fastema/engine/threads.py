"""The threads of CPU launches: an OpenMP team that a framework has loaded, or a pool of our own.

The threads of PyTorch's OpenMP team spin on their cores for a while after each operator, so an
update in a training loop finds them awake, and helpers of our own would have to share those cores.
Where no OpenMP is loaded, and in a forked child, which has none of its parent's threads, a pool
takes its place. Numba's parallel layers abort when two Python threads enter them, and are killed or
hang after a fork.

Every thread of a run calls the same serial code and takes rows from one shared cursor. This
balances the work however large the tensors are, and a thread that starts late finds nothing to do.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np

from fastema.errors import ArgumentError
from fastema.kernels import run_table as abi

__all__ = ["TEAM", "get_num_threads", "run_on_pool", "set_num_threads", "use_openmp"]

MOST_THREADS: Final = 32
"""Default limit of the pool. A few cores saturate a memory controller, and each helper costs a
wake-up."""

TEAM: Final = np.zeros(abi.TEAM_WORDS, np.int64)
"""The threads of this process, see :mod:`fastema.kernels.run_table`."""


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Pool:
    """Helper threads beside the calling thread, started on first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, helpers: int, task: Callable[[int], object], arg: int) -> list[Future[object]]:
        """Submit a task to helpers; return fewer futures, or none, if no thread can be started."""
        futures: list[Future[object]] = []
        with self._lock:
            if self._executor is None:
                # At least one: another thread may just have lowered the limit to one thread.
                self._executor = ThreadPoolExecutor(max(int(TEAM[abi.POOL]) - 1, 1), "fastema-run")
            try:
                for _ in range(helpers):
                    futures.append(self._executor.submit(task, arg))  # noqa: PERF401 (keeps those)
            except RuntimeError:
                # The last task was queued anyway, and its table may be freed before a thread runs
                # it: drop the queue. (At interpreter shutdown nothing was queued.)
                self._executor.shutdown(wait=False, cancel_futures=True)
                self._executor = None
        return futures

    def close(self) -> None:
        with self._lock:
            if self._executor is not None:
                self._executor.shutdown(wait=False)
            self._executor = None


TEAM[abi.POOL] = min(_cores(), MOST_THREADS)
_pool = _Pool()
_is_child = False
"""Whether this process was forked: it has none of the threads of its parent's team."""


def _after_fork() -> None:
    # The parent's threads do not exist in the child, and one of them may have held a lock.
    global _pool, _is_child
    _pool, _is_child = _Pool(), True
    TEAM[abi.PARALLEL] = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def use_openmp(parallel: int, size: int) -> None:
    """Run on the team of an OpenMP that is loaded. Each Python thread has a team of its own.

    A forked child keeps to its own pool.

    Parameters
    ----------
    parallel : int
        Address of its ``GOMP_parallel``, which LLVM's and Intel's OpenMP export too.
    size : int
        Address of a function without arguments that returns, as an int, how many threads an
        operator of the framework uses when the calling thread runs it.
    """
    if not _is_child:
        TEAM[abi.SIZE] = size
        TEAM[abi.PARALLEL] = parallel


def set_num_threads(threads: int) -> None:
    """Limit the number of threads that an update uses, including the calling thread.

    Parameters
    ----------
    threads : int
        From 1 to 1024. By default updates use as many threads as PyTorch does
        (``torch.get_num_threads()``, also if that changes later), on PyTorch's own OpenMP threads.
        For other frameworks, and where PyTorch has no OpenMP, the default is the number of cores
        the process may run on, at most 32.

    Raises
    ------
    ArgumentError
        If ``threads`` is not such a number.
    """
    global _pool
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ArgumentError(f"threads={threads!r}: expected a whole number from 1 to 1024")
    before, _pool = _pool, _Pool()
    TEAM[abi.MOST] = TEAM[abi.POOL] = threads
    before.close()


def get_num_threads() -> int:
    """Return the most threads that an update uses, including the calling thread."""
    if TEAM[abi.MOST] or not TEAM[abi.PARALLEL]:
        return int(TEAM[abi.POOL])
    size: int = ctypes.PYFUNCTYPE(ctypes.c_int)(int(TEAM[abi.SIZE]))()
    return size


def run_on_pool(threads: int, task: Callable[[int], object], arg: int) -> None:
    """Call ``task(arg)`` on this thread and on helpers of the pool; all have returned afterwards.

    Signals must be deferred.
    """
    futures = _pool.submit(threads - 1, task, arg)
    task(arg)
    for future in futures:
        if not future.cancel():
            future.result()
