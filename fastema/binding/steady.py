"""Runs over tensors that have stayed where they were matched: the usual step of a training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastema.engine.cpu import DONE, MOVED, CpuRun

__all__ = ["SteadyRun"]


class SteadyRun:
    """A native run that checks the tensors it was made for.

    Parameters
    ----------
    run : CpuRun
    checks : sequence of callable
        The checks that are left to Python: each returns True if a tensor has moved.
    listeners : sequence of (callable, arrays)
        Each is called with its arrays after a step.

    Attributes
    ----------
    call : callable
        :attr:`CpuRun.call`, after these checks.
    """

    def __init__(
        self,
        run: CpuRun,
        checks: Sequence[Callable[[], bool]],
        listeners: Sequence[tuple[Callable[[Any], None], Any]] = (),
    ) -> None:
        self.run, self._checks, self._listeners = run, checks, listeners
        # No bound method where there are no checks: a function more, and a cycle.
        self.call = partial(_call_unless_moved, checks, run.call) if checks else run.call
        if listeners:
            self.call = partial(_call_and_notify, self.call, listeners)

    def step(self) -> bool:
        """Take the next step, on threads of our own if it needs them; return whether it was run."""
        code = self.call()
        was_run = self.run.finish(code)
        if was_run and code != DONE:
            _notify(self._listeners)
        return was_run

    def repeat(self, weight: float, step: int) -> bool:
        """Run the repeated step and notify the listeners; see :meth:`CpuRun.repeat`."""
        for check in self._checks:
            if check():
                return False
        if not self.run.repeat(weight, step):
            return False
        _notify(self._listeners)
        return True


def _call_and_notify(
    call: Callable[[], int], listeners: Sequence[tuple[Callable[[Any], None], Any]]
) -> int:
    code = call()
    if code == DONE:
        _notify(listeners)
    return code


def _notify(listeners: Sequence[tuple[Callable[[Any], None], Any]]) -> None:
    for notify, arrays in listeners:
        notify(arrays)


def _call_unless_moved(checks: Sequence[Callable[[], bool]], call: Callable[[], int]) -> int:
    for check in checks:  # no any(): in a training loop, each function costs microseconds
        if check():
            return MOVED
    return call()
