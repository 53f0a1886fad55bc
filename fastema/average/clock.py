"""Count an average's steps, and run each update with the weight that its schedule gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from fastema.average.memory import SYNC
from fastema.average.options import OnNonFinite
from fastema.average.progress import Progress
from fastema.average.state import Saved
from fastema.average.weights import Weights
from fastema.binding.steady import SteadyRun
from fastema.engine.interrupts import defer_signals
from fastema.engine.program import Program
from fastema.errors import ArgumentError, NonFiniteError, StateError, format_problems
from fastema.layout.device_context import LaunchArgs
from fastema.rules import Schedule, Window
from fastema.rules.checks import MAX_STEPS, validate_int

__all__ = ["Clock", "HostClock", "launch_args", "operations_of"]

Load = Callable[[], None]
"""Sets a clock to a saved count; all checks are done."""


class Clock(Protocol):
    """Counts steps, on the host or on the device, and runs the updates that are due.

    Attributes
    ----------
    schedule : Schedule
    seed : int
        Seed of stochastic rounding.
    pending : int
        Steps taken but not averaged: the next update counts for them, too.
    """

    schedule: Schedule
    seed: int
    pending: int

    @property
    def done(self) -> int:
        """Steps counted so far; on a device, reading it waits."""

    @property
    def skipped(self) -> int:
        """Updates skipped because a weight was not finite; on a device, reading it waits."""

    @property
    def version(self) -> int:
        """Writes of the averages so far; on a device, reading it waits."""

    @property
    def log_decays(self) -> tuple[float, ...]:
        """What the rules remember, see :meth:`fastema.rules.Schedule.weigh`."""

    @property
    def is_before_start(self) -> bool:
        """Whether the averages still equal the weights, because of ``start_after``."""

    def check_steps(self, steps: Any) -> int:
        """Return the steps that the next update counts, with those that are pending.

        Raise an ArgumentError for an invalid number, or if this clock cannot count them at once.
        """

    def update(self, weights: Weights, program: Program, steps: int) -> int:
        """Count steps and update the averages if the schedule says so.

        Return the steps that remain for the next update: all but the latest if the weights are not
        finite, otherwise none.
        """

    def step(self, weights: Weights) -> bool:
        """Take one step in a native call; return False if anything is left to Python."""

    def begin_native(self, weights: Weights) -> SteadyRun | None:
        """Return the native run that takes the next steps; None if there is none."""

    def pause(self) -> None:
        """Let native calls do nothing until the next update; call it with signals deferred."""

    def check_leaving_out(self) -> None:
        """Raise an ArgumentError if the host cannot decide to leave a step out."""

    def leave_out(self) -> None:
        """Count a step that is not averaged in the next update."""

    def count_write(self) -> None:
        """Count a write of the averages that is not a step."""

    def prepare_load(self, saved: Saved) -> Load:
        """Return a function that continues from a saved count; raise what prevents it now."""

    def warm_up(self, weights: Weights) -> None:
        """Load all kernels of an update, if a graph may capture it."""

    def on(self, weights: Weights) -> Clock:
        """Return a clock for the averages' new memory, with the same count."""

    def retire(self, memory: Any) -> None:
        """Stop writing to the averages' memory, which is replaced."""


def operations_of(schedule: Schedule) -> dict[str, str]:
    """Return the kernel operations of an update, by the tags of :class:`Weights`."""
    return {"averaged": "window" if schedule.window else "lerp", "copied": "copy"}


def launch_args(schedule: Schedule, seed: int, step: int, weights: tuple[float, ...]) -> LaunchArgs:
    """Return the arguments of the kernels at a step, whose weights the schedule gave."""
    rule = schedule.rules[0]
    if not isinstance(rule, Window):
        return LaunchArgs(weights, seed, step)
    n, every = step - schedule.start_after, schedule.update_every
    if not n:
        return LaunchArgs()
    filled = float(rule.filled(n, every))
    return LaunchArgs((filled,), seed, step, rule.size, rule.slot(n, every), n // every)


class HostClock:
    """Clock on the host; see :class:`Clock`.

    Parameters
    ----------
    schedule : Schedule
    seed : int
    on_nonfinite : {"propagate", "skip", "raise"}
        What to do with a NaN or an infinity in the weights.
    ranks : Ranks, optional
        Processes that hold other parts of the weights, which decide together.
    """

    def __init__(
        self, schedule: Schedule, seed: int, on_nonfinite: OnNonFinite, ranks: Any
    ) -> None:
        self.schedule, self.seed, self.pending = schedule, seed, 0
        self._on_nonfinite: Final = on_nonfinite
        self._ranks = ranks
        self._skipped, self._operations = 0, operations_of(schedule)
        self._progress = Progress(schedule.log_decays(0))
        self.steady: SteadyRun | None = None

    # -- what is counted --------------------------------------------------------------------------

    @property
    def done(self) -> int:
        """See :class:`Clock`."""
        return self._progress.now().done

    @property
    def skipped(self) -> int:
        """See :class:`Clock`."""
        return self._skipped

    @property
    def version(self) -> int:
        """See :class:`Clock`."""
        return self._progress.now().version

    @property
    def log_decays(self) -> tuple[float, ...]:
        """See :class:`Clock`."""
        return self._progress.now().log_decays

    @property
    def is_before_start(self) -> bool:
        """See :class:`Clock`."""
        return self.schedule.follows(self.done)

    def check_steps(self, steps: Any) -> int:
        """See :class:`Clock`."""
        found = validate_int(steps, "steps", 1, MAX_STEPS - self.done - self.pending)
        if found + self.pending > 1 and self.schedule.window:
            raise ArgumentError(
                f"steps={found}: this average holds one entry per step; call update() each step"
            )
        return found + self.pending

    # -- updates ----------------------------------------------------------------------------------

    def update(self, weights: Weights, program: Program, steps: int) -> int:
        """See :class:`Clock`."""
        if weights.binding.capturing():
            raise StateError(
                "update() while the stream is captured: every replay would use the current step "
                "and decay; build the average with capturable=True"
            )
        if self._on_nonfinite != "propagate":
            step, numbers, _ = self._next(steps)
            if numbers and not self._check_finite(weights, step):
                return steps - 1
        schedule = self.schedule
        with defer_signals():
            step, numbers, log_decays = self._next(steps)  # now: a handler may have updated
            if numbers:
                # Until start_after, update with weight 1: averages on devices do, and rounding must
                # agree. A windowed mean has no slot yet, so copy.
                begins = schedule.window and step <= schedule.start_after
                args = launch_args(schedule, self.seed, step, numbers)
                program.run(SYNC if begins else self._operations, args)
            self._progress.set(step, log_decays, written=bool(numbers))
        return 0

    def _next(self, steps: int) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        """Return the count after these steps, their weights, and what the rules remember then."""
        now = self._progress.now()
        step = now.done + steps
        return step, *self.schedule.weigh(step, steps, now.log_decays)

    def _check_finite(self, weights: Weights, step: int) -> bool:
        """Return whether all weights are finite; otherwise follow ``on_nonfinite``."""
        names = weights.find_nonfinite()
        if not (names if self._ranks is None else self._ranks.any(bool(names))):
            return True
        if self._on_nonfinite == "raise":
            found = [f"{name!r} holds a NaN or an infinity" for name in names]
            raise NonFiniteError(
                f"weights are not finite at update {step}; the average is unchanged:\n"
                + format_problems(found or ["on another rank, whose error names them"])
            )
        self._skipped += 1
        return False

    def check_leaving_out(self) -> None:
        """Do nothing: the host decides."""

    def leave_out(self) -> None:
        """See :class:`Clock`."""
        # A windowed mean has an entry per averaged step, whatever was between them.
        with defer_signals():
            self.pending += not self.schedule.window
            self.pause()

    def count_write(self) -> None:
        """See :class:`Clock`."""
        with defer_signals():
            now = self._progress.now()
            self._progress.set(now.done, now.log_decays)

    # -- steps in one native call -----------------------------------------------------------------

    def step(self, weights: Weights) -> bool:
        """See :class:`Clock`."""
        steady = self.steady
        if steady is None or self.pending:
            return False
        if steady.step():
            return True
        return (
            weights.binding.is_present(steady)
            and self._progress.ask_rules(self.schedule, self._args)
            and steady.step()
        )

    def _args(self, step: int, numbers: tuple[float, ...]) -> LaunchArgs:
        return launch_args(self.schedule, self.seed, step, numbers)

    def begin_native(self, weights: Weights) -> SteadyRun | None:
        """See :class:`Clock`."""
        waits = self.schedule.window and self.is_before_start
        if self._on_nonfinite == "propagate" and not waits:
            steady = weights.begin_steady(self._operations)
            with defer_signals():  # a new run has a step, which must not be taken
                if steady is not None:
                    self._progress.begin(steady.run)
                self.steady = steady
            return steady
        return None

    def pause(self) -> None:
        """See :class:`Clock`."""
        self._progress.pause()

    # -- loading and moving -----------------------------------------------------------------------

    def prepare_load(self, saved: Saved) -> Load:
        """See :class:`Clock`."""

        def load() -> None:
            self.schedule, self.seed = saved.schedule, saved.counters["seed"]
            self._skipped, self.pending = saved.counters["num_skipped"], 0
            self._progress.set(saved.counters["num_updates"], saved.log_decays)

        return load

    def warm_up(self, weights: Weights) -> None:
        """Do nothing: no graph captures an update that is counted here."""

    def on(self, weights: Weights) -> HostClock:
        """See :class:`Clock`."""
        return self

    def retire(self, memory: Any) -> None:
        """See :class:`Clock`."""
        with defer_signals():
            self.pause()
