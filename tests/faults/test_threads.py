"""Averages under several Python threads, and the GIL during updates."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastema

from ..support.arrays import numbers

pytestmark = pytest.mark.usefixtures("eager")

SIZE = 700_000
W = 0.125


def run_together(tasks: list[Callable[[], None]]) -> None:
    """Run each task in its own thread at the same time; fail if one hangs or raises."""
    raised: list[BaseException] = []
    begun = threading.Barrier(len(tasks))

    def guarded(task: Callable[[], None]) -> None:
        try:
            begun.wait(30)
            task()
        except BaseException as error:
            raised.append(error)

    callers = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert raised == []


BUILDS: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "three": lambda w: fastema.EMA(w, (0.5, 0.9, 0.99)),
    "mean": lambda w: fastema.SMA(w, 3),
    "random": lambda w: fastema.EMA(w, 0.9, shadow_dtype="float16"),
    "guarded": lambda w: fastema.EMA(w, 0.9, on_nonfinite="skip"),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_calls_from_many_threads_are_complete_and_counted(
    build: Callable[[dict[str, np.ndarray]], Any], threads: Callable[[int], None]
) -> None:
    threads(3)
    weights = {"w": numbers(SIZE // 4, "f32", 1), "small": numbers(70, "f32", 2)}
    average, twin = build(weights), build(weights)
    for array in weights.values():
        array *= -0.5
    for _ in range(30):
        twin.update()

    def update() -> None:
        for _ in range(10):
            average.update()

    def look() -> None:
        for _ in range(10):
            average.state_dict()
            for shadow in average.shadows:
                assert np.isfinite(shadow["w"]).all()

    run_together([update, update, update, look])
    assert average.num_updates == 30
    found, want = average.state_dict(), twin.state_dict()
    for part in ("shadow", "residual", "ring"):
        for one, other in zip(found.get(part, ()), want.get(part, ()), strict=True):
            for name, array in one.items():
                np.testing.assert_array_equal(array, other[name])


def test_gil_is_released_during_an_update(threads: Callable[[int], None]) -> None:
    threads(1)
    avg, x = numbers(SIZE, "f32", 1), numbers(SIZE, "f32", 2)
    plan = fastema.Plan([np.tile(avg, 20)], [np.tile(x, 20)])
    plan.lerp_(W)
    seen: list[int] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            seen.append(0)
            time.sleep(0.0002)

    ticker = threading.Thread(target=tick)
    ticker.start()

    def ticks() -> int:
        seen.clear()
        plan.lerp_(W)
        return len(seen)

    # With the GIL held there is one tick before the kernel and one after it. A busy machine may
    # run the other thread during only a few of many updates.
    free = any(ticks() > 3 for _ in range(1000))
    stop.set()
    ticker.join()
    assert free
