"""CPU launches: which threads work, how they share rows, and what a launch leaves behind."""

import itertools
import threading
import time
from collections.abc import Callable

import pytest

import fastema
from fastema.engine import cpu

PLENTY = 64 * cpu.BYTES_PER_THREAD


class RecordingKernel:
    """A Python kernel that claims rows as a compiled one does and notes which thread took them."""

    def __init__(self, work: Callable[[int], None] = lambda row: None) -> None:
        self.work = work
        self.next = itertools.count()
        self.taken: dict[int, list[int]] = {}
        self.inside = 0
        self.entered = 0
        self.lock = threading.Lock()

    def __call__(self, table: int, rows: int, scalars: int, cursor: int) -> None:
        with self.lock:
            self.inside += 1
            self.entered += 1
        mine = self.taken.setdefault(threading.get_ident(), [])
        while (row := next(self.next)) < rows:
            self.work(row)
            mine.append(row)
        with self.lock:
            self.inside -= 1

    def rows(self) -> list[int]:
        return sorted(row for taken in self.taken.values() for row in taken)


def nap(row: int) -> None:
    time.sleep(0.002)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_row_is_taken_once(count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    assert fastema.get_num_threads() == count
    kernel = RecordingKernel(nap)
    cpu.launch(kernel, 0, 40, 0, 0, PLENTY)
    assert kernel.inside == 0
    assert kernel.rows() == list(range(40))
    assert 1 <= kernel.entered <= count
    if count > 1:
        assert len(kernel.taken) > 1


@pytest.mark.parametrize(
    ("rows", "nbytes", "most"),
    [
        (100, cpu.BYTES_PER_THREAD - 1, 1),
        (100, 2 * cpu.BYTES_PER_THREAD - 1, 1),
        (100, 3 * cpu.BYTES_PER_THREAD, 3),
        (2, PLENTY, 2),
        (1, PLENTY, 1),
        (0, 0, 1),
    ],
)
def test_threads_are_woken_only_for_enough_work(
    rows: int, nbytes: int, most: int, threads: Callable[[int], None]
) -> None:
    threads(4)
    kernel = RecordingKernel(nap)
    cpu.launch(kernel, 0, rows, 0, 0, nbytes)
    assert kernel.entered <= most
    assert kernel.rows() == list(range(rows))
    if most == 1:
        assert set(kernel.taken) == {threading.get_ident()}


@pytest.mark.parametrize("started", [0, 1])
def test_a_launch_completes_when_threads_cannot_start(
    started: int, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(4)
    start, starts = threading.Thread.start, itertools.count()

    def refuse(thread: threading.Thread) -> None:
        if next(starts) >= started:
            raise RuntimeError("can't start new thread")
        start(thread)

    first, second = RecordingKernel(nap), RecordingKernel(nap)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        cpu.launch(first, 0, 30, 0, 0, PLENTY)
    assert first.rows() == list(range(30))
    assert first.inside == 0
    entered = first.entered
    # Helpers that could not start must not start later: their table may be gone by then.
    cpu.launch(second, 0, 30, 0, 0, PLENTY)
    time.sleep(0.05)
    assert second.rows() == list(range(30))
    assert first.entered == entered


def test_default_thread_count_is_the_number_of_usable_cpus(python: Callable[..., str]) -> None:
    python("""
        import os
        import fastema
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
            assert fastema.get_num_threads() == 1
        assert 1 <= fastema.get_num_threads() <= 32
    """)
