"""How far an average is, and the steps that it can take without asking its rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, Final, NamedTuple

from fastema.engine.cpu import CpuRun
from fastema.engine.interrupts import defer_signals
from fastema.layout.device_context import LaunchArgs
from fastema.rules import Rule, Schedule
from fastema.rules.checks import MAX_STEPS

__all__ = ["Count", "Progress"]

_AHEAD: Final = 32
"""Steps that frozen rules are asked for at once: a few dozen microseconds, every so often."""

_Args = Callable[[int, tuple[float, ...]], LaunchArgs]
"""``args(step, weights)`` returns the launch arguments of a step."""


class Count(NamedTuple):
    """Steps counted, writes of the averages, and what the rules remember (Schedule.weigh)."""

    done: int
    version: int
    log_decays: tuple[float, ...]


class _Ahead(NamedTuple):
    """The counts after each of the next steps of a run, which did ``first`` steps before them."""

    counts: list[Count]
    first: int = 0
    run: CpuRun | None = None


class Progress:
    """Counts steps and writes; while native runs take the steps, their cursor is the count.

    A native run moves its cursor after its last launch, and nothing can interrupt it: the count and
    the averages always agree. Other threads may read the count at any time.
    """

    def __init__(self, log_decays: tuple[float, ...]) -> None:
        self._ahead = _Ahead([Count(0, 0, log_decays)])

    # -- what is counted --------------------------------------------------------------------------

    def now(self) -> Count:
        """Return the count so far."""
        while True:
            counts, first, run = self._ahead
            taken = 0 if run is None else run.num_done - first
            if taken < len(counts):  # otherwise another thread has just asked for more
                return counts[taken]

    # -- to be called with signals deferred, for a handler may update the average -----------------

    def set(self, done: int, log_decays: tuple[float, ...], *, written: bool = True) -> None:
        """Continue after ``done`` steps. Native runs do nothing until the next begin."""
        version = self.now().version + written
        self.pause()
        self._ahead = _Ahead([Count(done, version, log_decays)])

    def pause(self) -> None:
        """Let native runs do nothing until :meth:`ask_rules`."""
        run = self._ahead.run
        if run is not None:
            run.set_steps([])
            self._ahead = _Ahead([self.now()], run.num_done, run)

    def begin(self, run: CpuRun) -> None:
        """Let a native run take the next steps, once :meth:`ask_rules` has their weights."""
        run.set_steps([])
        self._ahead = _Ahead([self.now()], run.num_done, run)

    # -- steps in one native call -----------------------------------------------------------------

    def ask_rules(self, schedule: Schedule, args: _Args) -> bool:
        """Ask the rules for the weights of the next steps. Return False if some are left."""
        ahead = counts, first, run = self._ahead
        if run is None or run.num_done - first < len(counts) - 1:
            return False
        num_ahead = _AHEAD if all(map(_is_frozen, schedule.rules)) else 1
        done, version, log_decays = counts[-1]
        if done > MAX_STEPS - num_ahead:
            return False
        counts, steps = counts[-1:], []
        for step in range(done + 1, done + 1 + num_ahead):
            try:
                weights, log_decays = schedule.weigh(step, 1, log_decays)
            except Exception:  # a step that may never come; if it does, the rule is asked again
                break
            version += bool(weights)
            counts.append(Count(step, version, log_decays))
            steps.append(args(step, weights) if weights else None)
        with defer_signals():
            if self._ahead is ahead:  # otherwise a signal handler has updated the average
                run.set_steps(steps)
                self._ahead = _Ahead(counts, run.num_done, run)
        return bool(steps)


def _is_frozen(value: Any) -> bool:
    """Return whether a rule, with the rules in its fields, cannot change."""
    if isinstance(value, tuple):
        return all(map(_is_frozen, value))
    if not isinstance(value, Rule):
        return value is None or isinstance(value, str | int | float)
    options: Any = getattr(value, "__dataclass_params__", None)
    return (
        is_dataclass(value)
        and options.frozen
        and all(_is_frozen(getattr(value, field.name)) for field in fields(value))
    )
