"""Updates in processes that fork, exit, or cannot write anywhere."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX folders")

PREAMBLE = """
import atexit
import ctypes
import os
import signal
import sys
import threading
import time
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, tested on purpose
import numpy as np
import fastema
from fastema.engine import cpu
from fastema.layout.device_context import LaunchArgs
fastema.set_num_threads(3)
cpu.BYTES_PER_THREAD = cpu.BYTES_PER_HELPER = 1 << 12  # several threads for small tensors
SIZE = 700_000

def arrays(value):
    return np.full(SIZE, value, np.float32), np.full(SIZE, value + 2, np.float32)

def in_child(task):
    '''Run a task in a forked child, which must end well within 20 s.'''
    child = os.fork()
    if not child:
        try:
            task()
            os._exit(0)
        except BaseException as error:
            print("in the child:", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    end = time.monotonic() + 20
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, 9)
            raise SystemExit("the child hangs")
        time.sleep(0.002)
    assert done[1] == 0, f"the child ended with status {done[1]}"

def update(plan, avg, value):
    avg[:] = value
    plan.lerp_(0.5)
    assert (avg == value + 1).all(), avg[:3]
    print("updated", flush=True)

avg, x = arrays(2)
shared = fastema.Plan([avg], [x])
"""

# Script, and how many updates it must report.
CASES = {
    "a child and its child, and the parent goes on": (
        """
def task():
    own, weights = arrays(4)
    update(fastema.Plan([own], [weights]), own, 4)
    x[:] = 6
    update(shared, avg, 4)
    assert fastema.get_num_threads() == 3
    in_child(lambda: update(shared, avg, 4))

update(shared, avg, 2)
for _ in range(3):
    in_child(task)
update(shared, avg, 2)
""",
        11,
    ),
    # Averages in every memory layout, one of them applied.
    "a child that goes on with averages of its parent": (
        """
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

def after(steps):
    weights = {"w": np.ones(SIZE // 4, np.float32), "v": np.ones(9, np.float32)}
    several = [
        fastema.EMA(weights, (0.5, 0.9)),
        fastema.SMA(weights, 2),
        fastema.EMA(weights, 0.75, shadow_dtype="float16"),
        fastema.EMA(weights, 0.75, on_nonfinite="skip"),
    ]
    for n in range(steps):
        step(weights, several, n)
    return weights, several

weights, several = after(5)
several[2].apply_shadow()

def task():
    several[2].restore()
    for n in range(5, 8):
        step(weights, several, n)
    assert held(several) == held(after(8)[1])

for _ in range(2):
    in_child(task)
task()
""",
        0,
    ),
    # The main thread defers interrupts during an update; nobody ends that in a child forked then.
    "a child of another thread that can be interrupted": (
        """
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
begun, forked, well = threading.Event(), threading.Event(), []

def kernel(*_):
    begun.set()
    forked.wait(20)
    return 0

def task():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

def fork():
    begun.wait(20)
    try:
        in_child(task)
        well.append(True)
    finally:
        forked.set()

thread = threading.Thread(target=fork)
thread.start()
compiled = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(kernel)
table, control = np.zeros((2, 16), np.int64), np.zeros(8, np.int64)
launch = cpu.Launch(compiled, table, control, 2 * cpu.BYTES_PER_HELPER)
cpu.CpuRun([launch]).run(LaunchArgs())
thread.join()
assert well
""",
        0,
    ),
    "an exit handler, after updates": (
        """
atexit.register(update, shared, avg, 2)
update(shared, avg, 2)
""",
        2,
    ),
    "an end while a thread updates": (
        """
def loop():
    for _ in range(3):
        update(shared, avg, 2)

threading.Thread(target=loop).start()
sys.exit(0)
""",
        3,
    ),
    # By then, Python 3.12 and later cannot start threads, and earlier pools refuse work.
    "a thread that begins at the end": (
        """
def late():
    thread = threading.Thread(target=update, args=(shared, avg, 2))
    try:
        thread.start()
    except RuntimeError:
        update(shared, avg, 2)
    else:
        thread.join()

atexit.register(late)
update(shared, avg, 2)
""",
        2,
    ),
    "a finaliser that the collector calls at the end": (
        """
class Holder:
    def __init__(self):
        self.itself = self
    def __del__(self):
        update(shared, avg, 2)

Holder()
atexit.register(__import__("gc").collect)
""",
        1,
    ),
}
SLOW = {
    "forks while another thread is in an update": (
        """
stop = threading.Event()

def busy():
    while not stop.is_set():
        shared.lerp_(0.5)

def task():
    own, weights = arrays(4)
    update(fastema.Plan([own], [weights]), own, 4)
    update(shared, avg, 2)

update(shared, avg, 2)
thread = threading.Thread(target=busy, daemon=True)
thread.start()
for _ in range(30):
    in_child(task)
stop.set()
thread.join(20)
assert not thread.is_alive()
""",
        61,
    ),
    "a daemon thread that never stops, and updates at the end": (
        """
def loop():
    while True:
        shared.lerp_(0.5)

threading.Thread(target=loop, daemon=True).start()
time.sleep(0.2)
own, weights = arrays(4)
atexit.register(update, fastema.Plan([own], [weights]), own, 4)
""",
        1,
    ),
}


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_updates_complete_and_the_process_exits(case: str, python: Callable[..., str]) -> None:
    script, updates = {**CASES, **SLOW}[case]
    assert python(PREAMBLE + script, timeout=60).split() == ["updated"] * updates


NOWHERE = "/dev/null/nowhere"  # not even root can create a folder there
BARE = dict.fromkeys(
    ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "TMPDIR", "TEMP", "TMP", "LOCALAPPDATA"]
)
# Settings besides BARE ({} is a writable folder), and the expected cache folder.
HOMES: dict[str, tuple[dict[str, str], str | None]] = {
    "no home": ({"TMPDIR": "{}"}, "{}/fastema-USER"),
    "home that cannot be made": (
        {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE, "TMPDIR": "{}"},
        "{}/fastema-USER",
    ),
    "cache setting that cannot be written": (
        {"NUMBA_CACHE_DIR": NOWHERE, "XDG_CACHE_HOME": "{}"},
        "{}/fastema",
    ),
    "nothing that can be written": ({"HOME": NOWHERE, "TMPDIR": NOWHERE}, None),
}


@pytest.mark.parametrize("case", HOMES)
def test_kernels_are_cached_in_the_first_writable_folder_if_any(
    case: str, tmp_path: Path, python: Callable[..., str]
) -> None:
    given, folder = HOMES[case]
    script = """
        import pwd, sys, tempfile
        import numpy as np
        pwd.getpwuid = {}.__getitem__  # as in a container without a user database
        if sys.argv[1] == "None":
            tempfile._candidate_tempdir_list = lambda: ["/dev/null/nowhere"]
        import fastema
        avg, x = np.arange(1.0, 40.0), np.arange(1, 40, dtype=np.float32)
        fastema.lerp_([avg], [3 * x], 0.5)
        np.testing.assert_array_equal(avg, 2 * x)
        from fastema.engine import disk_cache
        print(disk_cache.folder())
    """
    settings = {**BARE, **{name: value.format(tmp_path) for name, value in given.items()}}
    used = Path(python(script, str(folder), **settings).strip())
    wanted = (folder or "").format(tmp_path).replace("USER", str(os.getuid()))
    assert str(used.parent if folder else used) == (wanted or "None")
