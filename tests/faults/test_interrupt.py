"""Ctrl-C at any moment: average, weights and counters agree, and no thread works on unseen."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastema

from ..shadow.kinds import KINDS, all_of, which
from ..support.peers import PEERS
from . import trials
from .interrupts import every_place, rung_during
from .trials import BLOCK_OPS, OPS, Op, PeerSide, Side, bits_of

pytestmark = pytest.mark.torch
needs_timers = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
# An interrupt that arrives while Python runs a weak reference's callback is printed and dropped.
may_be_dropped = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

Build = Callable[[Any], Any]

# Dtype of the weights, and what is built of them: one of each way to lie in memory, to be updated,
# and to change places with the weights.
CASES: dict[str, tuple[torch.dtype, Build]] = {
    "f32 in bf16": (torch.bfloat16, lambda w: fastema.EMA(w, 0.75, shadow_dtype="float32")),
    "f64 in f16": (torch.float16, lambda w: fastema.EMA(w, 0.75, shadow_dtype="float64")),
    "mean": (torch.float32, KINDS["SMA"]),
    "two halves": (torch.float32, KINDS["split"]),
    "three halves": (torch.bfloat16, KINDS["three split"]),
}
ON_THE_AVERAGE = ("update", "block", "apply and restore", "load_state_dict", "copy_to")


class Small(Side):
    """Three tensors: a call comes to few places."""

    def __init__(self, case: str, folder: Path) -> None:
        dtype, build = CASES[case]
        super().__init__(lambda _: None, dtype, folder)
        torch.manual_seed(0)
        self.model = {f"w{i}": torch.randn(n).to(dtype) for i, n in enumerate((3, 70))}
        self.model["n"] = torch.arange(5)
        self.other = {name: tensor + 1 for name, tensor in self.model.items()}
        self.average = build(self.model)


def interrupt_everywhere(subject: Side, twin: Side, op: Op) -> None:
    """Wherever an interrupt comes, the operation was done, all of it, or it was not."""
    states: list[Any] = []
    seeds = iter(range(10**6))

    def prepare() -> None:
        seed = next(seeds)
        for side in (subject, twin):
            side.train(seed)
        before = subject.held()
        assert before == twin.held()
        op.do(twin, 1)
        states[:] = [bits_of(subject.model), before, twin.held()]

    def check() -> None:
        raw, before, after = states
        subject.settle()
        assert bits_of(subject.model) == raw
        found = subject.held()
        assert found in (before, after), trials._differing(found, before, after)
        if found != after:
            op.do(subject, 1)
        subject.n, twin.n = subject.n + 1, twin.n + 1
        prepare()

    prepare()
    every_place(lambda: op.do(subject, 1), check)


@pytest.mark.parametrize("name", ON_THE_AVERAGE)
@pytest.mark.parametrize("case", CASES)
def test_operation_interrupted_at_every_place_is_done_or_not(
    case: str, name: str, tmp_path: Path
) -> None:
    interrupt_everywhere(Small(case, tmp_path / "1"), Small(case, tmp_path / "2"), OPS[name])


@pytest.mark.parametrize("case", ["f32 in bf16", "two halves"])
def test_conversion_interrupted_at_every_place_loses_no_bit(case: str, tmp_path: Path) -> None:
    side = Small(case, tmp_path / "1")
    kept = side.average.state_dict()
    back = "bf16+16" if "residual" in kept else kept["shadow"][0]["w0"].dtype

    def values() -> dict[str, bytes]:
        target = {name: tensor.double() for name, tensor in side.other.items()}
        target["n"] = side.other["n"].clone()
        side.average.copy_to(target, **which(side.average))
        return bits_of(target)

    wanted = values()

    def check() -> None:
        assert values() == wanted
        side.average.update()
        assert values() != wanted
        side.average.to(back)
        side.average.load_state_dict(kept)

    side.train(5)
    every_place(lambda: side.average.to(torch.float64), check)


def test_drop_in_interrupted_at_every_place_is_whole(tmp_path: Path) -> None:
    peer = PEERS["torch_ema"]
    options = peer.schedules[next(iter(peer.schedules))]
    subject, twin = (PeerSide(peer, options, tmp_path / side) for side in ("subject", "twin"))
    interrupt_everywhere(subject, twin, BLOCK_OPS["block"])


def test_skipped_update_interrupted_at_every_place_writes_nothing() -> None:
    weights = {"w": torch.randn(70), "n": torch.arange(5)}
    ema = fastema.EMA(weights, 0.5, on_nonfinite="skip")
    before = bits_of(dict(ema.shadow))
    weights["w"][69] = float("nan")
    weights["n"] += 1
    seen = [0]

    def check() -> None:
        assert ema.num_skipped - seen[0] in (0, 1)
        seen[0] = ema.num_skipped
        assert ema.num_updates == 0
        assert bits_of(dict(ema.shadow)) == before

    every_place(ema.update, check)
    assert seen[0] > 20


# -- real signals ---------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = fastema.get_num_threads()
    fastema.set_num_threads(2)
    yield
    fastema.set_num_threads(before)


@pytest.mark.slow
@needs_timers
@may_be_dropped
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("case", CASES)
def test_timers_in_swaps_and_updates_lose_nothing(case: str) -> None:
    dtype, build = CASES[case]
    weights = {f"w{i}": torch.randn(n).to(dtype) for i, n in enumerate((700_000, 1, 300_001))}
    average, twin = build(weights), build(weights)
    for tensor in weights.values():
        tensor.mul_(-2)
    raw, chance, rung = bits_of(weights), random.Random(0), 0
    states = {0: all_of(twin)}

    def several() -> None:
        for _ in range(3):
            average.update()
            with average.swapped(**which(average)):
                pass

    for _ in range(40):
        rung += rung_during(chance.uniform(1e-5, 8e-3), several)
        if average.applied:
            average.restore()
        assert bits_of(weights) == raw
        while twin.num_updates < average.num_updates:
            twin.update()
        states = {twin.num_updates: all_of(twin)}
        assert all_of(average) == states[average.num_updates]
    assert rung


# CPython looks for signals where a Python function begins and after a call of a C function. There
# an interrupt is raised: at the first such place, then at the second, and so on to the last. Inside
# threading.py are places where it would leave a condition locked for ever; those are Python's.
IMPORTS = """
import concurrent.futures.thread
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import numpy as np
import fastema
from fastema.engine import cpu

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
HOME = os.path.dirname(fastema.__file__)
POOL = {concurrent.futures.thread.__file__, concurrent.futures._base.__file__}
faulthandler.dump_traceback_later(40, exit=True)
cpu.BYTES_PER_THREAD = 1 << 12  # helpers are woken for little

class InterruptAt:
    def __init__(self, n):
        self.n, self.seen, self.place = n, 0, ""

    def __call__(self, frame, event, argument):
        file = frame.f_code.co_filename
        if event not in ("call", "c_return") or not (file.startswith(HOME) or file in POOL):
            return
        self.seen += 1
        if self.seen == self.n:
            self.place = f"{os.path.basename(file)}:{frame.f_lineno} {frame.f_code.co_name}"
            signal.raise_signal(signal.SIGINT)
"""
LOOP = """
task(begin())
wrong = []
for n in range(1, 1000):
    interrupt = InterruptAt(n)
    state = begin()
    sys.setprofile(interrupt)
    try:
        task(state)
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    if not check(state):
        wrong.append(interrupt.place)
    if interrupt.seen < n:
        break
print(json.dumps([n, wrong]))
"""
SCRIPTS = {
    "threads are left in a kernel": """
class Work:
    # A kernel in Python that takes rows, slowly, and knows who is in it.
    def __init__(self):
        self.left, self.inside, self.entered, self.lock = 16, 0, 0, threading.Lock()

    def __call__(self, *_):
        with self.lock:
            self.inside += 1
            self.entered += 1
        while True:
            with self.lock:
                if not self.left:
                    self.inside -= 1
                    return
                self.left -= 1
            time.sleep(0.0005)

begin = Work

def task(work):
    cpu.launch(work.__call__, 0, 16, 0, 0, 64 * cpu.BYTES_PER_THREAD)

def check(work):
    inside, entered = work.inside, work.entered
    time.sleep(0.003)
    # Neither inside now nor later: what was queued must have been taken back.
    return not inside and work.entered == entered

fastema.set_num_threads(4)
""",
    "an update is half done": """
SIZE = 1 << 19
avg, x = np.full(SIZE, 2, np.float32), np.full(SIZE, 6, np.float32)
plan = fastema.Plan([avg[:9], avg[9:]], [x[:9], x[9:]])

def begin():
    avg[:] = 2
    return plan

def task(plan):
    plan.lerp_(0.25)

def check(plan):
    time.sleep(0.001)
    value = avg[0]
    free = not plan.binding._bound.program._lock.locked()
    return value in (2, 3) and (avg == value).all() and free

fastema.set_num_threads(2)
""",
}


@pytest.mark.parametrize("fault", SCRIPTS)
def test_launch_interrupted_anywhere_is_whole(fault: str, python: Callable[..., str]) -> None:
    places, wrong = json.loads(python(IMPORTS + SCRIPTS[fault] + LOOP, quiet=False))
    assert places > 20
    assert wrong == [], f"interrupted there, {fault}"
