"""CPU runs: which threads work, how they share rows, and what a run leaves behind."""

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fastema
from fastema.engine import cpu
from fastema.engine import threads as engine_threads
from fastema.engine.interrupts import defer_signals
from fastema.kernels import run_table
from fastema.layout.device_context import LaunchArgs

PLENTY = 64 * cpu.BYTES_PER_HELPER
KERNEL = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)


class RecordingKernel:
    """A Python kernel that claims rows as a compiled one does and notes which thread took them."""

    def __init__(self, work: Callable[[int], None] = lambda row: None) -> None:
        self.work = work
        self.next = itertools.count()
        self.taken: dict[int, list[int]] = {}
        self.inside = 0
        self.entered = 0
        self.lock = threading.Lock()
        self.compiled = KERNEL(self)

    def __call__(self, table: int, rows: int, scalars: int, cursor: int) -> int:
        with self.lock:
            self.inside += 1
            self.entered += 1
        mine = self.taken.setdefault(threading.get_native_id(), [])
        while (row := next(self.next)) < rows:
            self.work(row)
            mine.append(row)
        with self.lock:
            self.inside -= 1
        return 0

    def rows(self) -> list[int]:
        return sorted(row for taken in self.taken.values() for row in taken)


def nap(row: int) -> None:
    time.sleep(0.002)


def launch(kernel: RecordingKernel, rows: int, nbytes: int) -> cpu.Launch:
    table = np.zeros((rows, 16), np.int64)
    return cpu.Launch(kernel.compiled, table, np.zeros(8, np.int64), nbytes)


def run(kernel: RecordingKernel, rows: int, nbytes: int = PLENTY) -> None:
    cpu.CpuRun([launch(kernel, rows, nbytes)], on_team=True).run(LaunchArgs())


@pytest.fixture(params=["pool", "openmp"])
def team(request: pytest.FixtureRequest, threads: Callable[[int], None]) -> Iterator[Any]:
    """``set_num_threads``, with a pool of our own and with PyTorch's OpenMP."""
    before = engine_threads.TEAM.copy()
    if request.param == "pool":
        engine_threads.TEAM[run_table.PARALLEL] = 0
    else:
        team = pytest.importorskip("fastema.bridges.torch_openmp").openmp()
        if team is None:
            pytest.skip("this PyTorch has no OpenMP")
        engine_threads.use_openmp(*team)
    yield threads
    engine_threads.TEAM[:] = before


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_row_is_taken_once(count: int, team: Callable[[int], None]) -> None:
    team(count)
    assert fastema.get_num_threads() == count
    kernel = RecordingKernel(nap)
    run(kernel, 40)
    assert kernel.inside == 0
    assert kernel.rows() == list(range(40))
    assert 1 <= kernel.entered <= count
    if count > 1:
        assert len(kernel.taken) > 1


@pytest.mark.parametrize("share", [0, 1, 2, 3, 64])
def test_threads_take_part_only_for_enough_work(share: int, team: Callable[[int], None]) -> None:
    team(4)
    pool = not engine_threads.TEAM[run_table.PARALLEL]
    unit = cpu.BYTES_PER_HELPER if pool else cpu.BYTES_PER_THREAD
    for rows in (0, 1, 2, 100):
        kernel = RecordingKernel(nap)
        run(kernel, rows, max(unit * (share + 1) - 1, 0))
        most = max(min(share, rows, 4), 1)
        assert kernel.entered <= most
        assert kernel.rows() == list(range(rows))
        if most == 1:
            assert {*kernel.taken} == {threading.get_native_id()}


def test_several_launches_are_run_by_all_threads(team: Callable[[int], None]) -> None:
    team(3)
    kernels = [RecordingKernel(nap) for _ in range(3)]
    together = cpu.CpuRun([launch(one, 12, PLENTY) for one in kernels], on_team=True)
    for turn in (1, 2, 3):
        together.run(LaunchArgs())
        assert all(one.entered <= 3 * turn and one.inside == 0 for one in kernels)
        assert all(one.rows() == list(range(12)) for one in kernels)
        for one in kernels:
            one.next, one.taken = itertools.count(), {}


def test_steps_are_counted_after_their_last_launch(team: Callable[[int], None]) -> None:
    team(2)
    seen = []
    kernel = RecordingKernel(lambda row: seen.append(steps.num_done))
    steps = cpu.CpuRun([launch(kernel, 4, PLENTY)], on_team=True)
    steps.set_steps([LaunchArgs(), None, LaunchArgs()])
    for done in (1, 2, 3):
        kernel.next = itertools.count()
        assert steps.finish(steps.call())
        assert steps.num_done == done
    assert seen == [0] * 4 + [2] * 4
    assert not steps.finish(steps.call())  # none is left
    assert steps.num_done == 3


def test_steps_of_a_signal_handler_before_threads_are_woken(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(2)
    monkeypatch.setattr(cpu, "BYTES_PER_HELPER", 1)
    x = [np.ones(9), np.ones(5, np.float32), np.ones(1 << 17, np.float32)]
    ema = fastema.EMA(x, 0.5)
    ema.update()
    ema.update()
    engine_threads.TEAM[run_table.PARALLEL] = 0
    for one in x:
        one[...] = 2
    steady = ema._clock.steady
    assert steady is not None
    code = steady.call()
    assert code == run_table.NEEDS_POOL
    ema.update()  # the handler's
    assert steady.run.finish(code)
    assert ema.num_updates == 4
    assert all((one == 1.75).all() for one in ema.shadow.values())


def test_the_limit_is_lowered_while_a_run_begins(threads: Callable[[int], None]) -> None:
    threads(1)
    kernel = RecordingKernel()
    with defer_signals():
        engine_threads.run_on_pool(4, lambda _: kernel(0, 30, 0, 0), 0)
    assert kernel.rows() == list(range(30))


@pytest.mark.parametrize("started", [0, 1])
def test_a_run_completes_when_threads_cannot_start(
    started: int, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(4)
    engine_threads.TEAM[run_table.PARALLEL] = 0
    start, starts = threading.Thread.start, itertools.count()

    def refuse(thread: threading.Thread) -> None:
        if next(starts) >= started:
            raise RuntimeError("can't start new thread")
        start(thread)

    first, second = RecordingKernel(nap), RecordingKernel(nap)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        run(first, 30)
    assert first.rows() == list(range(30))
    assert first.inside == 0
    entered = first.entered
    # Helpers that could not start must not start later: their table may be gone by then.
    run(second, 30)
    time.sleep(0.05)
    assert second.rows() == list(range(30))
    assert first.entered == entered


def test_other_python_threads_run_during_a_run(team: Callable[[int], None]) -> None:
    team(1)
    ticks, stop = itertools.count(), threading.Event()

    def count() -> None:
        while not stop.is_set():
            next(ticks)
            time.sleep(0)

    pytest.importorskip("torch")
    size = 1 << 22
    plan = fastema.Plan([np.ones(size, np.float32)], [np.zeros(size, np.float32)])
    plan.lerp_(0.5)
    thread = threading.Thread(target=count)
    thread.start()
    before = next(ticks)
    for _ in range(20):
        plan.lerp_(0.5)
    after = next(ticks)
    stop.set()
    thread.join()
    assert after - before > 20


def test_default_thread_count_is_the_number_of_usable_cpus(python: Callable[..., str]) -> None:
    python("""
        import os
        import fastema
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
            assert fastema.get_num_threads() == 1
        assert 1 <= fastema.get_num_threads() <= 32
    """)


def test_default_thread_count_is_that_of_pytorch(python: Callable[..., str]) -> None:
    pytest.importorskip("torch")
    python("""
        import threading
        import torch
        import fastema
        from fastema.engine.threads import TEAM
        from fastema.kernels.run_table import PARALLEL
        torch.set_num_threads(3)
        model = torch.nn.Linear(9, 9)
        ema = fastema.EMA(model)
        if TEAM[PARALLEL]:
            for count in (3, 1, 5):
                torch.set_num_threads(count)
                assert fastema.get_num_threads() == count
            found = []
            other = threading.Thread(target=lambda: found.append(fastema.get_num_threads()))
            other.start()
            other.join()
            assert found == [5]
        fastema.set_num_threads(2)
        assert fastema.get_num_threads() == 2
        ema.update()
    """)


def test_python_mode_does_not_wait_for_threads_that_need_the_gil(
    python: Callable[..., str],
) -> None:
    pytest.importorskip("torch")
    python(
        """
        import faulthandler
        faulthandler.dump_traceback_later(30, exit=True)
        import torch
        import fastema
        from fastema.engine import cpu
        cpu.BYTES_PER_THREAD = 1
        torch.set_num_threads(3)
        model = [torch.zeros(8) for _ in range(3)]
        ema = fastema.EMA(model, decay=0.5)
        for one in model:
            one += 1
        for _ in range(3):
            ema.update()
        assert all((one == 0.875).all() for one in ema.shadow.values())
        """,
        NUMBA_DISABLE_JIT="1",
    )


def test_only_averages_of_pytorch_run_on_its_team(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    used = []
    made = cpu.CpuRun.__init__

    def watch(self: cpu.CpuRun, *args: Any, **options: Any) -> None:
        used.append(options.get("on_team", False))
        made(self, *args, **options)

    monkeypatch.setattr(cpu.CpuRun, "__init__", watch)
    for weights, wanted in (([np.ones(3)], False), ([torch.ones(3)], True)):
        used.clear()
        ema = fastema.EMA(weights)
        ema.update()
        ema.update()
        assert used[-1] is wanted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_use_the_parents_team(python: Callable[..., str]) -> None:
    pytest.importorskip("torch")
    python("""
        import os, signal
        import torch
        import fastema
        torch.set_num_threads(2)
        model = torch.nn.Linear(1500, 1500)
        ema = fastema.EMA(model, decay=0.5)
        for _ in range(3):
            ema.update()
        child = os.fork()
        if not child:
            signal.alarm(20)  # ends a child that hangs
            with torch.no_grad():
                model.weight.view(-1).numpy()[:] = 1
            before = ema.shadow["weight"].numpy().copy()
            ema.update()
            wanted = before + 0.5 * (1 - before)
            os._exit(0 if abs(ema.shadow["weight"].numpy() - wanted).max() < 1e-6 else 1)
        assert os.waitpid(child, 0)[1] == 0
        ema.update()
        assert ema.num_updates == 4
    """)
