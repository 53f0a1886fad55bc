"""Forked children use what their parent has used: pools, plans, locks."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    # From Python 3.12 on, forking beside other threads is warned of; here that is the point.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

PREAMBLE = """
import os
import sys
import threading
import time
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
import numpy as np
import fastema
from fastema.engine import cpu
fastema.set_num_threads(3)
cpu.BYTES_PER_THREAD = 1 << 12  # helpers are woken for little
SIZE = 700_000

def arrays(value):
    return np.full(SIZE, value, np.float32), np.full(SIZE, value + 2, np.float32)

def in_child(task):
    '''Run a task in a forked child, which must end well within 20 s.'''
    child = os.fork()
    if not child:
        code = 1
        try:
            task()
            code = 0
        except BaseException as error:
            print("in the child:", repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"the child ended with status {status}"
            return
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise SystemExit("the child hangs")

def update(plan, avg, value):
    avg[:] = value
    plan.lerp_(0.5)
    assert (avg == value + 1).all(), avg[:3]

avg, x = arrays(2)
shared = fastema.Plan([avg], [x])
update(shared, avg, 2)
"""


def test_child_and_its_child_update_after_their_parent_did(python: Callable[..., str]) -> None:
    python(
        PREAMBLE
        + """
def task():
    own, weights = arrays(4)
    update(fastema.Plan([own], [weights]), own, 4)
    x[:] = 6
    update(shared, avg, 4)
    assert fastema.get_num_threads() == 3
    in_child(lambda: update(shared, avg, 4))

for _ in range(3):
    in_child(task)
update(shared, avg, 2)  # and the parent goes on
"""
    )


def test_child_goes_on_with_averages_of_its_parent(python: Callable[..., str]) -> None:
    """Of every way to lie in memory, and while one of them is applied."""
    python(
        PREAMBLE
        + """
def averages(weights):
    return [
        fastema.EMA(weights, (0.5, 0.9)),
        fastema.SMA(weights, 2),
        fastema.EMA(weights, 0.75, shadow_dtype="float16"),
        fastema.EMA(weights, 0.75, on_nonfinite="skip", drift=True),
    ]

def step(weights, several, n):
    for i, array in enumerate(weights.values()):
        array[:] = np.random.default_rng([n, i]).normal(size=array.shape)
    for one in several:
        one.update()

def held(several):
    return [
        array.tobytes()
        for one in several
        for part in ("shadow", "residual", "ring")
        for tensors in one.state_dict().get(part, ())
        for array in tensors.values()
    ]

def fresh():
    weights = {"w": np.ones(SIZE // 4, np.float32), "v": np.ones(9, np.float32)}
    return weights, averages(weights)

weights, several = fresh()
for n in range(5):
    step(weights, several, n)
third = several[2]
third.apply_shadow()

def task():
    third.restore()
    for n in range(5, 8):
        step(weights, several, n)
    other_weights, others = fresh()
    for n in range(8):
        step(other_weights, others, n)
    assert held(several) == held(others)

for _ in range(2):
    in_child(task)
task()
"""
    )


@pytest.mark.slow
@pytest.mark.parametrize("which", ["own", "shared"])
def test_fork_while_another_thread_is_in_an_update(which: str, python: Callable[..., str]) -> None:
    python(
        PREAMBLE
        + """
which = sys.argv[1]
stop = threading.Event()

def busy():
    while not stop.is_set():
        shared.lerp_(0.5)

def task():
    if which == "own":
        own, weights = arrays(4)
        update(fastema.Plan([own], [weights]), own, 4)
    else:
        update(shared, avg, 2)

thread = threading.Thread(target=busy, daemon=True)
thread.start()
try:
    for _ in range(30):
        in_child(task)
finally:
    stop.set()
thread.join(20)
assert not thread.is_alive()
update(shared, avg, 2)
""",
        which,
    )


@pytest.mark.torch
@pytest.mark.slow
def test_workers_of_a_data_loader(python: Callable[..., str]) -> None:
    pytest.importorskip("torch")
    script = """
        import torch
        import fastema
        from fastema.engine import cpu
        from torch.utils.data import DataLoader, Dataset

        fastema.set_num_threads(2)
        cpu.BYTES_PER_THREAD = 1 << 12
        SIZE = 700_000

        def averaged(value):
            avg, x = torch.full((SIZE,), float(value)), torch.full((SIZE,), value + 2.0)
            fastema.lerp_([avg], [x], 0.5)
            assert (avg == value + 1).all()
            return avg[:3]

        model = torch.nn.Linear(800, 800)
        ema = fastema.EMA(model, decay=0.5)

        class Items(Dataset):
            def __len__(self):
                return 8
            def __getitem__(self, i):
                ema.update()
                return averaged(i)

        if __name__ == "__main__":
            averaged(1)
            ema.update()
            loader = DataLoader(
                Items(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=30
            )
            for _ in range(2):
                rows = torch.cat(list(loader))
                assert torch.equal(rows[:, 0], torch.arange(1.0, 9.0)), rows
                averaged(1)
                ema.update()
            print("done")
    """
    assert python(script, quiet=False).strip() == "done"


def test_child_of_another_thread_can_be_interrupted(python: Callable[..., str]) -> None:
    # Interrupts wait while the main thread updates; in a child forked meanwhile nobody ends that.
    python(
        PREAMBLE
        + """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
begun, forked = threading.Event(), threading.Event()
problems = []

def kernel(*_):
    begun.set()
    forked.wait(20)

def task():
    handler = signal.getsignal(signal.SIGINT)
    assert handler is signal.default_int_handler, handler

def fork():
    begun.wait(20)
    try:
        in_child(task)
    except BaseException as error:
        problems.append(error)
    finally:
        forked.set()

thread = threading.Thread(target=fork)
thread.start()
cpu.launch(kernel, 0, 2, 0, 0, 2 * cpu.BYTES_PER_THREAD)
thread.join()
assert not problems, problems
"""
    )
