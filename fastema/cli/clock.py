"""Time jobs in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

SETTLE_S = 0.005
"""Pause before each timed call, in seconds. OpenMP threads spin for some milliseconds after torch's
parallel regions and take cores from the next job, which runs on other threads. On two cores, with
ResNet-50 shapes, the read-read-write limit took 6.0 to 6.7 ms without the pause, 5.1 ms with it."""

MIN_ROUNDS = 3
"""Rounds that are timed even if they exceed the budget."""


def interleave(
    jobs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    hot: bool = False,
    budget_s: float = float("inf"),
    settle_s: float = SETTLE_S,
    before_round: Callable[[], object] = lambda: None,
    time_of: Callable[[str, Callable[[], object]], float] = lambda name, job: seconds(job),
) -> dict[str, list[float]]:
    """Time all jobs in turn, A B C A B C ..., so that disturbances of the machine hit all alike.

    Parameters
    ----------
    jobs
        Name -> call.
    rounds
        Maximum number of timed rounds; one untimed warm-up round comes first.
    hot
        Call each job once, untimed, directly before its timed call.
    budget_s
        Time in seconds after which no new round begins, once `MIN_ROUNDS` are done.
    settle_s
        Pause before each call, in seconds.
    before_round
        Called before each round, the warm-up included.
    time_of
        ``time_of(name, job)`` calls the job once and returns its duration in seconds.

    Returns
    -------
    dict
        Name -> durations in seconds, one per timed round.
    """
    before_round()
    for job in jobs.values():
        job()
    durations: dict[str, list[float]] = {name: [] for name in jobs}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget_s
        for done in range(rounds):
            if done >= MIN_ROUNDS and time.perf_counter() > end:
                break
            before_round()
            for name, job in jobs.items():
                time.sleep(settle_s)
                if hot:
                    job()
                durations[name].append(time_of(name, job))
    finally:
        gc.enable()
    return durations


def seconds(call: Callable[[], object]) -> float:
    """Call a function and return how long it took, in seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
