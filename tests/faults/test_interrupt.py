"""Ctrl-C at any moment: average, weights and counters agree, and no thread keeps working."""

import concurrent.futures.thread
import ctypes
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.engine import cpu
from fastema.engine.threads import TEAM
from fastema.kernels.run_table import PARALLEL
from fastema.layout.device_context import LaunchArgs

from ..average.kinds import KINDS
from .interrupts import OURS, interrupt_each
from .trials import OPS, Op, PeerSide, Side, bits_of, describe_change, peer_block

pytestmark = pytest.mark.torch

# Dtype of the weights and the average's constructor: one for each memory layout, kind of update and
# kind of swap.
CASES: dict[str, tuple[torch.dtype, Callable[[Any], Any]]] = {
    "f32 in bf16": (torch.bfloat16, lambda w: fastema.EMA(w, 0.75, shadow_dtype="float32")),
    "f64 in f16": (torch.float16, lambda w: fastema.EMA(w, 0.75, shadow_dtype="float64")),
    "mean": (torch.float32, KINDS["SMA"]),
    "two halves": (torch.float32, KINDS["split"]),
    "three halves": (torch.bfloat16, KINDS["three split"]),
}
ON_THE_AVERAGE = ("update", "block", "apply and restore", "load_state_dict", "copy_to")


class Small(Side):
    """A model of three tensors, so that a call has few places."""

    def __init__(self, case: str, folder: Path) -> None:
        dtype, build = CASES[case]
        super().__init__(lambda _: None, dtype, folder)
        torch.manual_seed(0)
        self.model = {f"w{i}": torch.randn(n).to(dtype) for i, n in enumerate((3, 70))}
        self.model["n"] = torch.arange(5)
        self.other = {name: tensor + 1 for name, tensor in self.model.items()}
        self.average = build(self.model)


def interrupt_everywhere(subject: Side, twin: Side, op: Op) -> None:
    """Check that an interrupted operation is done completely or not at all, at any place."""
    states: list[Any] = []

    def prepare() -> None:
        for side in (subject, twin):
            side.train(side.n)
        before = subject.snapshot()
        assert before == twin.snapshot()
        op(twin, 1)
        states[:] = [bits_of(subject.model), before, twin.snapshot()]

    def check() -> None:
        raw, before, after = states
        subject.settle()
        assert bits_of(subject.model) == raw
        found = subject.snapshot()
        assert found in (before, after), describe_change(found, before, after)
        if found != after:
            op(subject, 1)
        subject.n, twin.n = subject.n + 1, twin.n + 1
        prepare()

    prepare()
    interrupt_each(lambda: op(subject, 1), check)


@pytest.mark.parametrize("name", ON_THE_AVERAGE)
@pytest.mark.parametrize("case", CASES)
def test_operation_interrupted_at_any_place_is_done_or_not(
    case: str, name: str, tmp_path: Path
) -> None:
    interrupt_everywhere(Small(case, tmp_path / "1"), Small(case, tmp_path / "2"), OPS[name])


def test_drop_in_interrupted_at_any_place_is_done_or_not(tmp_path: Path) -> None:
    sides = [PeerSide("torch_ema", tmp_path / side) for side in ("1", "2")]
    interrupt_everywhere(*sides, peer_block)


class InterruptAt:
    """A profiler that sends a signal at the n-th place where CPython checks for signals.

    Those are the start of a Python function and the return from a C function. It skips
    threading.py, where an interrupt can leave a condition locked forever: a flaw of Python's.
    """

    files = (OURS, concurrent.futures.thread.__file__, concurrent.futures._base.__file__)

    def __init__(self, n: int, number: int = signal.SIGINT) -> None:
        self.left, self.place, self.number = n, "", number

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event in ("call", "c_return") and file.startswith(self.files):
            self.left -= 1
            if not self.left:
                self.place = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
                signal.raise_signal(self.number)


def find_wrong_places(call: Callable[[], object], check: Callable[[], bool]) -> list[str]:
    """Interrupt a call everywhere; return the places after which the check fails."""
    wrong, handler = [], signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for n in itertools.count(1):
            interrupt = InterruptAt(n)
            sys.setprofile(interrupt)
            try:
                call()
            except KeyboardInterrupt:
                pass
            finally:
                sys.setprofile(None)
            if not check():
                wrong.append(interrupt.place)
            if interrupt.left > 0:
                assert n > 20
                return wrong
    finally:
        signal.signal(signal.SIGINT, handler)
    raise AssertionError("not reached")


@pytest.mark.usefixtures("eager")
def test_interrupted_launch_leaves_no_thread_in_the_kernel(threads: Callable[[int], None]) -> None:
    threads(4)
    TEAM[PARALLEL] = 0  # a pool of our own: nothing interrupts the other native calls
    lock, left, inside, entered = threading.Lock(), 0, 0, 0

    def kernel(*_: object) -> int:
        """Take rows slowly, and count the threads inside."""
        nonlocal left, inside, entered
        with lock:
            inside, entered = inside + 1, entered + 1
        while True:
            with lock:
                if not left:
                    inside -= 1
                    return 0
                left -= 1
            time.sleep(0.0005)

    compiled = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(kernel)
    table, control = np.zeros((16, 16), np.int64), np.zeros(8, np.int64)
    run = cpu.CpuRun([cpu.Launch(compiled, table, control, 1 << 30)])

    def launch() -> None:
        nonlocal left
        left = 16
        run.run(LaunchArgs())

    def check() -> bool:
        """Return whether no thread is inside or enters later: queued work was withdrawn."""
        before = inside, entered
        time.sleep(0.003)
        return before == (0, entered)

    launch()
    assert find_wrong_places(launch, check) == []


@pytest.mark.usefixtures("eager")
def test_interrupted_update_is_done_or_not(threads: Callable[[int], None]) -> None:
    threads(2)
    size = 1 << 19
    avg, x = np.full(size, 2, np.float32), np.full(size, 6, np.float32)
    plan = fastema.Plan([avg[:9], avg[9:]], [x[:9], x[9:]])

    def update() -> None:
        avg[:] = 2
        plan.lerp_(0.25)

    def check() -> bool:
        time.sleep(0.001)
        free = not plan.binding._bound.program._lock.locked()
        return free and avg[0] in (2, 3) and bool((avg == avg[0]).all())

    update()
    assert find_wrong_places(update, check) == []


@pytest.mark.parametrize("begin", [2, 30, 34])
def test_native_steps_interrupted_at_any_place_are_counted_if_taken(begin: int) -> None:
    """The first step is Python's; then rules are asked for 32 steps at a time."""
    w = torch.zeros(5)
    ema = fastema.EMA([w], 0.5)
    value, counted = np.float32(0), 0

    def expect(steps: int) -> None:
        nonlocal value, counted
        for _ in range(steps):
            value += np.float32(0.5) * (np.float32(w[0]) - value)
        counted += steps
        assert ema.num_updates == counted
        np.testing.assert_array_equal(ema.shadow["0"], value)

    def prepare() -> None:
        while (counted - begin) % 32:
            w.fill_(float(counted % 7))
            ema.update()
            expect(1)
        w.fill_(9.0)

    def call() -> None:
        for _ in range(4):
            ema.update()

    def check() -> None:
        assert 0 <= ema.num_updates - counted <= 4
        expect(ema.num_updates - counted)
        prepare()

    prepare()
    interrupt_each(call, check)


def _move(model: dict[str, torch.Tensor]) -> None:
    for tensor in model.values():
        tensor.data = tensor.data.clone()


CALLS: dict[str, Callable[[Any, dict[str, torch.Tensor]], object]] = {
    "update": lambda ema, _: ema.update(),
    "update of moved tensors": lambda ema, model: (_move(model), ema.update()),
    "to": lambda ema, _: ema.to(torch.float64),
    "state_dict": lambda ema, _: ema.load_state_dict(ema.state_dict()),
}


@pytest.mark.parametrize("updates", [0, 34])
@pytest.mark.parametrize("name", CALLS)
def test_handler_that_updates_at_any_place_keeps_count_and_average_together(
    name: str, updates: int
) -> None:
    def check() -> None:
        assert ema.shadow["w"].item() == 0.5**ema.num_updates, interrupt.place

    def update_thrice(number: int, frame: FrameType | None) -> None:
        for _ in range(3):
            ema.update()

    before = signal.signal(signal.SIGUSR1, update_thrice)
    try:
        for n in itertools.count(1):
            model = {"w": torch.ones(1)}
            ema = fastema.EMA(model, decay=0.5)
            model["w"].zero_()
            for _ in range(updates):
                ema.update()
            interrupt = InterruptAt(n, signal.SIGUSR1)
            sys.setprofile(interrupt)
            try:
                CALLS[name](ema, model)
            finally:
                sys.setprofile(None)
            for _ in range(2):
                check()
                ema.update()
            if interrupt.left > 0:
                return
    finally:
        signal.signal(signal.SIGUSR1, before)
