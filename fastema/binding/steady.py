"""Runs over tensors that have stayed where they were matched: the usual step of a training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from fastema.engine.cpu import MOVED, CpuRun

__all__ = ["SteadyRun"]


class SteadyRun:
    """A native run that checks the tensors it was made for.

    Parameters
    ----------
    run : CpuRun
    checks : sequence of callable
        The checks that are left to Python: each returns True if a tensor has moved.

    Attributes
    ----------
    call : callable
        :attr:`CpuRun.call`, after these checks.
    """

    def __init__(self, run: CpuRun, checks: Sequence[Callable[[], bool]]) -> None:
        self.run, self._checks = run, checks
        # No bound method where there are no checks: a function more, and a cycle.
        self.call = partial(_call_unless_moved, checks, run.call) if checks else run.call

    def has_moved(self) -> bool:
        """Return whether the checks that are left to Python find that a tensor has moved."""
        return any(check() for check in self._checks)


def _call_unless_moved(checks: Sequence[Callable[[], bool]], call: Callable[[], int]) -> int:
    for check in checks:  # no any(): in a training loop, each function costs microseconds
        if check():
            return MOVED
    return call()
