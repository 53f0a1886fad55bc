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
    roots : sequence of (object, dict)
        Objects that must still have these attributes, as :attr:`Watch.roots`.

    Attributes
    ----------
    call : callable
        Takes the next step after all checks: :attr:`CpuRun.call` in one more function.
    native : callable
        :attr:`CpuRun.call` itself if there is nothing but one of the ``roots``, which the caller
        then checks: in a training loop, each function costs microseconds. Otherwise :attr:`call`.
    """

    def __init__(
        self,
        run: CpuRun,
        checks: Sequence[Callable[[], bool]],
        listeners: Sequence[tuple[Callable[[Any], None], Any]] = (),
        roots: Sequence[tuple[Any, Any]] = (),
    ) -> None:
        self.run, self._checks, self._listeners, self.roots = run, checks, listeners, roots
        # No bound method: that would be a cycle.
        self.call: Callable[[], int] = partial(_call, run.call, checks, listeners, roots)
        self.native = self.call if checks or listeners or len(roots) > 1 else run.call

    def step(self) -> bool:
        """Take the next step, on threads of our own if it needs them; return whether it was run."""
        code = self.call()
        was_run = self.run.finish(code)
        if was_run and code != DONE:
            _notify(self._listeners)
        return was_run

    def repeat(self, weight: float, step: int) -> bool:
        """Run the repeated step and notify the listeners; see :meth:`CpuRun.repeat`."""
        if self._checks and any(check() for check in self._checks):
            return False
        for root, attributes in self.roots:
            if root.__dict__ is not attributes:
                return False
        if not self.run.repeat(weight, step):
            return False
        _notify(self._listeners)
        return True


def _call(
    call: Callable[[], int],
    checks: Sequence[Callable[[], bool]],
    listeners: Sequence[tuple[Callable[[Any], None], Any]],
    roots: Sequence[tuple[Any, Any]],
) -> int:
    for root, attributes in roots:  # no any(): each function costs microseconds
        if root.__dict__ is not attributes:
            return MOVED
    for check in checks:
        if check():
            return MOVED
    code = call()
    if code == DONE and listeners:
        _notify(listeners)
    return code


def _notify(listeners: Sequence[tuple[Callable[[Any], None], Any]]) -> None:
    for notify, arrays in listeners:
        notify(arrays)
