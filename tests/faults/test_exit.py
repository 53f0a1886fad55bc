"""The interpreter shuts down cleanly whatever is still being updated."""

from __future__ import annotations

from collections.abc import Callable

import pytest

PREAMBLE = """
import atexit
import sys
import threading
import time
import numpy as np
import fastema
from fastema.engine import cpu
fastema.set_num_threads(3)
cpu.BYTES_PER_THREAD = 1 << 12  # helpers are woken for little
SIZE = 700_000
avg, x = np.full(SIZE, 2.0, np.float32), np.full(SIZE, 4.0, np.float32)
plan = fastema.Plan([avg], [x])

def update():
    avg[:] = 2
    plan.lerp_(0.5)
    assert (avg == 3).all()
    print("updated", flush=True)
"""

# What is run, and how often it says that an update was done.
CASES = {
    "in an exit handler, after updates": ("atexit.register(update)\nupdate()", 2),
    "while a thread updates": (
        """
def loop():
    for _ in range(3):
        update()
threading.Thread(target=loop).start()
sys.exit(0)
""",
        3,
    ),
    # From Python 3.12 on no thread can be started by then; before, the pool refuses work.
    "in a thread that begins at the end": (
        """
def late():
    thread = threading.Thread(target=update)
    try:
        thread.start()
    except RuntimeError:
        update()
    else:
        thread.join()

atexit.register(late)
update()
""",
        2,
    ),
    "in a finaliser that the collector calls": (
        """
class Holder:
    def __init__(self):
        self.itself = self
    def __del__(self):
        update()

Holder()
atexit.register(__import__("gc").collect)
""",
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_updates_at_the_end_are_done_and_the_process_ends(
    case: str, python: Callable[..., str]
) -> None:
    script, updates = CASES[case]
    assert python(PREAMBLE + script, timeout=30).split() == ["updated"] * updates


@pytest.mark.slow
@pytest.mark.parametrize("during", ["main", "handler"])
def test_daemon_thread_that_never_stops(during: str, python: Callable[..., str]) -> None:
    script = """
def loop():
    while True:
        plan.lerp_(0.5)

threading.Thread(target=loop, daemon=True).start()
time.sleep(0.2)
if sys.argv[1] == "handler":
    other = fastema.Plan([avg.copy()], [x.copy()])
    atexit.register(lambda: [other.lerp_(0.5) for _ in range(20)])
print("end", flush=True)
"""
    for _ in range(4):
        assert python(PREAMBLE + script, during, timeout=30).strip() == "end"
