"""Forks while another thread loads or compiles kernels."""

import os
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PREAMBLE = """
import os, sys, threading, warnings

warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks beside threads

def fork(check):
    # Run a check in a forked child; return whether it was true.
    pid = os.fork()
    if pid == 0:
        os._exit(0 if check() else 1)
    return os.waitpid(pid, 0)[1] == 0

def begin(task):
    # Start a thread that holds a lock; it ends a while after it has the lock.
    begun = threading.Event()
    def run():
        task(lambda: (begun.set(), threading.Event().wait(0.5)))
    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    return thread

def is_free(lock):
    # Ask in another thread, which does not own the lock.
    found = []
    thread = threading.Thread(target=lambda: found.append(lock.acquire(blocking=False)))
    thread.start()
    thread.join()
    return found == [True]
"""


def test_a_fork_waits_until_another_thread_has_loaded_its_kernel(
    python: Callable[..., str],
) -> None:
    script = """
from fastema.engine import locks, native, registry
def load(wait):
    native.function = lambda *key: wait() and len
    registry.function("check_tensors")
thread = begin(load)
assert fork(lambda: ("check_tensors", (), "") in registry._loaded and is_free(locks.compiling))
thread.join()
assert is_free(locks.compiling)
"""
    python(PREAMBLE + script, timeout=60)


def test_a_fork_waits_until_numba_has_compiled_for_others(python: Callable[..., str]) -> None:
    script = """
import fastema.engine.locks
from numba.core.compiler_lock import global_compiler_lock
@global_compiler_lock
def compile_something(wait):
    wait()
thread = begin(compile_something)
assert fork(lambda: is_free(global_compiler_lock._lock))
thread.join()
assert is_free(global_compiler_lock._lock)
"""
    python(PREAMBLE + script, timeout=60)


def test_a_fork_by_the_thread_that_compiles_does_not_wait_for_itself(
    python: Callable[..., str],
) -> None:
    script = """
from fastema.engine import locks
with locks.compiling:
    assert fork(lambda: not is_free(locks.compiling))
assert is_free(locks.compiling)
"""
    python(PREAMBLE + script, timeout=60)


def test_threads_that_fork_at_once_leave_the_lock_free(python: Callable[..., str]) -> None:
    script = """
from fastema.engine import locks
found = []
threads = [
    threading.Thread(target=lambda: found.extend(fork(lambda: True) for _ in range(15)))
    for _ in range(3)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert found == [True] * 45, found
assert not locks._held_over_fork
assert is_free(locks.compiling)
"""
    python(PREAMBLE + script, timeout=60)
