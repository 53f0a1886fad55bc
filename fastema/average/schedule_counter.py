"""Count an average's updates on the GPU, so that captured graphs can advance the count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fastema.engine.step_counter import StepCounter, contexts_of, tables_of
from fastema.errors import ArgumentError, CheckpointError
from fastema.layout.device_context import DeviceContext, LaunchArgs
from fastema.rules import Rule, Schedule, Window

__all__ = ["ScheduleCounter", "Tables", "refuse_uneven", "tables_for"]

Tables = list[NDArray[np.float64]]


def _by_update(rule: Rule, every: int) -> Callable[[int], float]:
    return lambda update: rule.weight(update * every, every)


def _window(schedule: Schedule) -> int:
    """Return the ring slots of a windowed mean; 0 for other averages."""
    first = schedule.rules[0]
    return first.size if isinstance(first, Window) else 0


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
    if _window(schedule):
        return []
    return tables_of([_by_update(rule, schedule.update_every) for rule in schedule.rules])


def refuse_uneven(schedule: Schedule, done: int, log_decays: Sequence[float]) -> None:
    """Refuse a saved run whose bias correction depends on updates of several steps at once."""
    for rule, saved, even in zip(
        schedule.rules, log_decays, schedule.log_decays(done), strict=True
    ):
        if not math.isclose(saved, even, rel_tol=1e-9):
            raise CheckpointError(
                f"{rule!r} was saved by a run that took several steps at once, update(steps=n), "
                "which an average that counts on the GPU cannot continue: build it without "
                "capturable=True"
            )


class ScheduleCounter:
    """Counts updates by a schedule, on every device that holds a part of the average."""

    def __init__(
        self,
        contexts: Mapping[str, DeviceContext | None],
        schedule: Schedule,
        seed: int,
        done: int = 0,
        skipped: int = 0,
    ) -> None:
        tables = tables_for(schedule)
        self._clock = StepCounter(contexts_of(contexts), len(schedule.rules))
        self.set(schedule, tables, seed, done, skipped)

    @property
    def args(self) -> LaunchArgs:
        """Arguments for running a program with the counted step and weights."""
        return self._clock.args

    def advance(self) -> None:
        """Advance to the next update, on the current streams."""
        self._clock.advance()

    def done(self) -> int:
        """Return the number of updates so far; wait for the device."""
        return self._clock.done()

    def skipped(self) -> int:
        """Return how many updates were skipped for a non-finite weight; wait for the device."""
        return self._clock.skipped()

    def set(self, schedule: Schedule, tables: Tables, seed: int, done: int, skipped: int) -> None:
        """Continue after ``done`` updates with another schedule; ``tables`` are its tables."""
        self._clock.set(
            tables,
            done=done,
            seed=seed,
            start=schedule.start_after,
            every=schedule.update_every,
            window=_window(schedule),
            skipped=skipped,
        )
