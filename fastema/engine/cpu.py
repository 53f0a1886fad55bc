"""Runs on the CPU: launches of serial kernels over tables, on several threads, in a native call."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.engine import threads
from fastema.engine.interrupts import defer_signals
from fastema.engine.native import is_jit_disabled
from fastema.engine.registry import Kernel, function
from fastema.kernels import run_table as abi
from fastema.kernels.run_table import DONE, MOVED, NO_STEP
from fastema.layout.device_context import LaunchArgs

__all__ = ["DONE", "MOVED", "NO_STEP", "CpuRun", "Launch", "run_kernel"]

BYTES_PER_THREAD: Final = 1 << 19
"""Minimum work per thread of an OpenMP team that is awake: entering it takes a few microseconds, in
which a core moves some 100 KB in its cache. Smaller runs stay on the calling thread."""

BYTES_PER_HELPER: Final = 64 << 20
"""The same for helpers of the pool, which sleep: waking one takes 20-200 microseconds, and in a
loop on NumPy arrays a second thread brought nothing below 200 MB on two cores."""

BYTES_ALONE: Final = 8 << 20
"""The same for a call with nothing around it: in 20-200 microseconds a core moves 1-8 MB."""


_FLOAT, _INTEGER = struct.Struct("d"), struct.Struct("q")


class Launch(NamedTuple):
    """A kernel, its table and its control block, and the bytes that it reads or writes."""

    kernel: Kernel
    table: NDArray[np.int64]
    control: NDArray[np.int64]
    nbytes: int


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class CpuRun:
    """Launches that run together, on as many threads as their work justifies.

    The launches must not depend on each other: a thread begins the next one while others are still
    at work on the one before. The caller excludes concurrent calls for the same launches.

    Parameters
    ----------
    launches : sequence of Launch
    num_averages : int
        Count of the numbers that the kernels read, see :mod:`fastema.kernels.table`.
    watches : sequence of int
        Addresses of the tasks of compiled checks (:mod:`fastema.kernels.watch_table`). The run does
        nothing if one of them finds a difference.
    on_team : bool
        Whether to run on the OpenMP team of a framework, if there is one, which the framework's
        own operators keep awake. Beside those of another library (NumPy's BLAS), whose threads spin
        as well, its threads would have to wait for a core.

    Attributes
    ----------
    call : callable
        Runs the next step in one native call and returns one of the codes of
        :mod:`fastema.kernels.run_table`, 0 if all is done; :meth:`finish` does the rest.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        num_averages: int = 1,
        watches: Sequence[int] = (),
        *,
        on_team: bool = False,
    ) -> None:
        self._take_rows: Callable[[int], int] = function("run_launches")
        # Python needs the GIL, which the calling thread of an OpenMP team would not release.
        python = is_jit_disabled()
        check = function("check_tensors") if watches else None
        nbytes = sum(launch.nbytes for launch in launches)
        rows = max((len(launch.table) for launch in launches), default=0)
        table = np.array(
            [
                (_address(kernel), table.ctypes.data, len(table), control.ctypes.data)
                for kernel, table, control, _ in launches
            ],
            np.int64,
        ).reshape(-1, abi.LAUNCH)
        tasks = np.array([*watches], np.int64)
        self._words = words = np.zeros(abi.WORDS, np.int64)
        words[abi.WATCHES], words[abi.WATCHES_AT] = len(tasks), tasks.ctypes.data
        words[abi.CHECK] = 0 if check is None else _address(check)
        words[abi.SELF] = _address(self._take_rows)
        words[abi.LAUNCHES], words[abi.LAUNCHES_AT] = len(table), table.ctypes.data
        most = min(rows, nbytes // BYTES_PER_THREAD) if on_team and not python else 1
        words[abi.THREADS] = max(most, 1)
        words[abi.POOL_THREADS] = max(min(rows, nbytes // BYTES_PER_HELPER), 1)
        words[abi.STEP_WORDS] = abi.FIRST_NUMBER + num_averages
        words[abi.TEAM] = threads.TEAM.ctypes.data
        if not python:
            words[abi.SAVE] = _address(ctypes.pythonapi.PyEval_SaveThread)
            words[abi.RESTORE] = _address(ctypes.pythonapi.PyEval_RestoreThread)
        self._address = words.ctypes.data
        self._run: Callable[[int, int, int], int] = function("run_program")
        self.call: Callable[[], int] = partial(self._run, self._address, 0, 0)
        self._keep = launches, table, tasks, check  # their addresses are stored
        self.set_steps([LaunchArgs()])

    def set_steps(self, steps: Sequence[LaunchArgs | None], *, repeat: bool = False) -> None:
        """Set the arguments of the next calls, None for a call that does nothing.

        All have one seed. With ``repeat`` every call is the first step, see :meth:`repeat`. Call it
        with signals deferred: a handler that updates the average would run half of this.
        """
        words, seed = self._words, 0
        table = np.zeros((len(steps) or 1, int(words[abi.STEP_WORDS])), np.int64)
        numbers = table[:, abi.FIRST_NUMBER :].view(np.float64)
        for row, args in enumerate(steps):
            if args is not None:
                table[row, : abi.FIRST_NUMBER] = 1, args.step, args.window, args.slot, args.turn
                numbers[row, : len(args.numbers)] = args.numbers
                seed = args.seed
        self._steps = table
        words[abi.STEPS], words[abi.STEPS_AT] = len(steps), table.ctypes.data
        words[abi.FIRST], words[abi.ADVANCE] = words[abi.CURSOR], not repeat
        words[abi.SEED] = seed

    def repeat(self, weight: float, step: int) -> bool:
        """Run the repeated step with another weight; random bits depend on ``step``.

        Return False if nothing was done: a tensor has moved.
        """
        (bits,) = _INTEGER.unpack(_FLOAT.pack(weight))
        code = self._run(self._address, step, bits)
        return code == abi.DONE or self.finish(code, step, bits)

    def run(self, args: LaunchArgs) -> None:
        """Run once with these arguments, with signals deferred; see :meth:`set_steps`."""
        self.set_steps([args])
        self.finish(self.call())

    @property
    def num_done(self) -> int:
        """Number of steps done so far."""
        return int(self._words[abi.CURSOR])

    def finish(self, code: int, step: int = 0, bits: int = 0) -> bool:
        """Finish a step, from what :attr:`call` returned. Return whether the step was run.

        A repeated step needs its number and the bits of its weight once more.
        """
        if code == abi.NEEDS_POOL:
            with defer_signals():
                # Prepare it again: until now a signal handler may have run steps.
                code = self._run(self._address, step, bits)
                if code == abi.NEEDS_POOL:
                    words = self._words
                    threads.run_on_pool(int(words[abi.LIMIT]), self._take_rows, self._address)
                    words[abi.CURSOR] += words[abi.ADVANCE]
                    return True
        return code == abi.DONE


def run_kernel(launch: Launch, numbers: int) -> None:
    """Run a kernel whose control block is complete; ``numbers`` is the address that it is given."""
    run = CpuRun([launch])
    run._words[abi.STEPS_AT], run._words[abi.NUMBERS] = 0, numbers
    run._words[abi.POOL_THREADS] = max(min(len(launch.table), launch.nbytes // BYTES_ALONE), 1)
    run.finish(run.call())
