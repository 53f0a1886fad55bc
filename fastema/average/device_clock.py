"""Count an average's updates on the GPU, so that captured graphs can advance the count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastema.average.clock import Load, operations_of
from fastema.average.state import Saved
from fastema.average.weights import Weights
from fastema.engine.interrupts import defer_signals
from fastema.engine.program import Program
from fastema.engine.step_counter import StepCounter, contexts_of, tables_of
from fastema.engine.streams import keep_for_graphs
from fastema.errors import ArgumentError, CheckpointError
from fastema.rules import Rule, Schedule
from fastema.rules.checks import MAX_STEPS, validate_int

__all__ = ["DeviceClock", "tables_for"]

Tables = list[NDArray[np.float64]]


def _by_update(rule: Rule, every: int) -> Callable[[int], float]:
    return lambda update: rule.weight(update * every, every)


def tables_for(schedule: Schedule) -> Tables:
    """Return the tables by which a counter follows a schedule.

    Raises
    ------
    ArgumentError
        If no table can represent the schedule.
    """
    if schedule.offset:
        raise ArgumentError(
            f"capturable=True counts update_every={schedule.update_every} from start_after="
            f"{schedule.start_after}, but {schedule.rules[0]!r} averages at other steps"
        )
    if schedule.window:
        return []
    return tables_of([_by_update(rule, schedule.update_every) for rule in schedule.rules])


def _check_even(schedule: Schedule, done: int, log_decays: Sequence[float]) -> None:
    """Raise a CheckpointError if a saved bias correction depends on updates of several steps."""
    for rule, saved, even in zip(
        schedule.rules, log_decays, schedule.log_decays(done), strict=True
    ):
        if not math.isclose(saved, even, rel_tol=1e-9):
            raise CheckpointError(
                f"{rule!r} was saved by a run that took several steps at once, update(steps=n), "
                "which an average that counts on the GPU cannot continue: build it without "
                "capturable=True"
            )


class DeviceClock:
    """Clock on every device that holds a part of the averages; see :class:`Clock`.

    Parameters
    ----------
    schedule : Schedule
    seed : int
    skips : bool
        Whether the device skips updates while a weight is not finite.
    weights : Weights
        The weights, on the devices that count.
    done, skipped : int
        The count to begin with.

    Raises
    ------
    ArgumentError
        If the weights are not on GPUs, or no table can represent the schedule.
    StateError
        If a slower substitute runs in place of a kernel.
    """

    pending = 0

    def __init__(
        self,
        schedule: Schedule,
        seed: int,
        skips: bool,
        weights: Weights,
        done: int = 0,
        skipped: int = 0,
    ) -> None:
        self.schedule, self.seed, self._skips = schedule, seed, skips
        tables = tables_for(schedule)
        self._counter = StepCounter(contexts_of(weights.binding.contexts), len(schedule.rules))
        self._writes = 0
        self._was_captured = False
        self._set(tables, done, skipped)
        self.warm_up(weights)

    def _set(self, tables: Tables, done: int, skipped: int) -> None:
        schedule = self.schedule
        self._counter.set(
            tables,
            done=done,
            seed=self.seed,
            start=schedule.start_after,
            every=schedule.update_every,
            window=schedule.window,
            skipped=skipped,
        )

    def warm_up(self, weights: Weights) -> None:
        """Run one update that changes nothing, so that every kernel is loaded."""
        with weights.current() as program:
            program.run(operations_of(self.schedule), self._counter.args)
        if self._skips:
            weights.prepare_flag()

    # -- what is counted --------------------------------------------------------------------------

    @property
    def done(self) -> int:
        """See :class:`Clock`."""
        return self._counter.done()

    @property
    def skipped(self) -> int:
        """See :class:`Clock`."""
        return self._counter.skipped()

    @property
    def version(self) -> int:
        """See :class:`Clock`."""
        return self._writes + self.done

    @property
    def log_decays(self) -> tuple[float, ...]:
        """See :class:`Clock`; every update is one step here."""
        return self.schedule.log_decays(self.done)

    @property
    def is_before_start(self) -> bool:
        """See :class:`Clock`."""
        # Without start_after, do not fetch the count from the device.
        return self.schedule.start_after > 0 and self.schedule.follows(self.done)

    def check_steps(self, steps: Any) -> int:
        """See :class:`Clock`."""
        found = validate_int(steps, "steps", 1, MAX_STEPS)
        if found > 1:
            raise ArgumentError(
                f"steps={found}: this average counts on the GPU; call update() each step"
            )
        return found

    # -- updates ----------------------------------------------------------------------------------

    def update(self, weights: Weights, program: Program, steps: int) -> int:
        """See :class:`Clock`: enqueue an update, now and in replays of a captured graph."""
        operations, counter = operations_of(self.schedule), self._counter
        program.prepare(operations)
        self._was_captured = self._was_captured or weights.binding.capturing()
        with defer_signals():
            if self._skips:
                weights.flag_nonfinite(counter.args)
            counter.advance()
            program.run(operations, counter.args)
        return 0

    def check_leaving_out(self) -> None:
        """Raise an ArgumentError: a captured graph does not ask the host."""
        raise ArgumentError(
            "update_if= is called on the host, which a captured graph does not do; leave it or "
            "capturable=True out"
        )

    def leave_out(self) -> None:
        """See :meth:`check_leaving_out`."""
        self.check_leaving_out()

    def count_write(self) -> None:
        """See :class:`Clock`."""
        self._writes += 1

    def step(self, weights: Weights) -> bool:
        """Return False: the launches of a GPU are left to Python."""
        return False

    def begin_native(self, weights: Weights) -> None:
        """Return None; see :meth:`step`."""
        return None

    def pause(self) -> None:
        """Do nothing: no native call takes steps."""

    # -- loading and moving -----------------------------------------------------------------------

    def prepare_load(self, saved: Saved) -> Load:
        """See :class:`Clock`."""
        tables = tables_for(saved.schedule)
        counters = saved.counters
        _check_even(saved.schedule, counters["num_updates"], saved.log_decays)

        def load() -> None:
            self.schedule, self.seed = saved.schedule, counters["seed"]
            self._writes += 1
            self._set(tables, counters["num_updates"], counters["num_skipped"])

        return load

    def on(self, weights: Weights) -> DeviceClock:
        """See :class:`Clock`."""
        clock = DeviceClock(self.schedule, self.seed, self._skips, weights, self.done, self.skipped)
        clock._writes = self._writes
        return clock

    def retire(self, memory: Any) -> None:
        """See :class:`Clock`: replays of a captured graph write the old memory for good."""
        if self._was_captured:
            keep_for_graphs(memory, self._counter)
