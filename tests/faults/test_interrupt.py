"""An interrupt leaves no tensor half updated, and no thread at work behind the caller's back."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

import fastema

from ..support.arrays import numbers

SIZE = 1 << 20


class Alarms:
    """Interrupts this process again and again; one comes through each time it is armed."""

    def __init__(self) -> None:
        self.armed = False
        self.stop = threading.Event()

    def __enter__(self) -> Alarms:
        self.before = signal.signal(signal.SIGINT, self.ring)
        self.sender = threading.Thread(target=self.send)
        self.sender.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.armed = False
        self.stop.set()
        self.sender.join()
        signal.signal(signal.SIGINT, self.before)

    def ring(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt

    def send(self) -> None:
        delays = np.random.default_rng(5)
        while not self.stop.wait(delays.uniform(0, 1e-3)):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("count", [1, 3])
def test_interrupted_updates_are_whole(count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    cut = [0, 1, 1000, SIZE // 3, SIZE]
    whole, x = numbers(SIZE, "f32", 1), numbers(SIZE, "f32", 2)
    plan = fastema.Plan([whole[a:b] for a, b in pairwise(cut)], [x[a:b] for a, b in pairwise(cut)])
    plan.lerp_(0.25)
    interrupted = 0
    with Alarms() as alarms:
        for _ in range(150):
            before = whole.copy()
            after = before + np.float32(0.25) * (x - before)  # a power of two: rounded alike
            try:
                alarms.armed = True
                plan.lerp_(0.25)
                alarms.armed = False
            except KeyboardInterrupt:
                interrupted += 1
            assert np.array_equal(whole, after) or np.array_equal(whole, before)
    assert interrupted > 20


# CPython looks for signals where a Python function begins and after a call of a C function. There
# an interrupt is raised: at the first such place, then at the second, and so on to the last. Inside
# threading.py are places where it would leave a condition locked for ever; those are Python's.
PREAMBLE = """
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
from fastema.engine import cpu, program

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

def everywhere(task, check):
    '''The places at which an interrupt of task makes check fail.'''
    wrong = []
    for n in range(1, 1000):
        interrupt = InterruptAt(n)
        state = task(None)
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


def test_no_thread_is_left_in_a_kernel(python: Callable[..., str]) -> None:
    script = """
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

def task(work):
    if work is None:
        return Work()
    cpu.launch(work.__call__, 0, 16, 0, 0, 64 * cpu.BYTES_PER_THREAD)

def check(work):
    inside, entered = work.inside, work.entered
    time.sleep(0.003)
    # Neither inside now nor later: what was queued must have been taken back.
    return not inside and work.entered == entered

fastema.set_num_threads(4)
task(Work())
everywhere(task, check)
"""
    places, wrong = json.loads(python(PREAMBLE + script, quiet=False))
    assert places > 20
    assert wrong == [], "interrupted there, a launch leaves threads at work"


def test_an_interrupt_anywhere_leaves_a_run_whole(python: Callable[..., str]) -> None:
    script = """
SIZE = 1 << 19
avg, x = np.full(SIZE, 2, np.float32), np.full(SIZE, 6, np.float32)
plan = fastema.Plan([avg[:9], avg[9:]], [x[:9], x[9:]])

def task(state):
    if state is None:
        avg[:] = 2
        return plan
    plan.lerp_(0.25)

def check(state):
    time.sleep(0.001)
    value = avg[0]
    free = not plan.binding._bound.program._lock.locked()
    return value in (2, 3) and (avg == value).all() and free

fastema.set_num_threads(2)
task(task(None))
everywhere(task, check)
"""
    places, wrong = json.loads(python(PREAMBLE + script, quiet=False))
    assert places > 20
    assert wrong == [], "interrupted there, an update is left half done"
