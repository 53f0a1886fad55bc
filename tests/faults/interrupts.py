"""KeyboardInterrupt at chosen moments: at every place where Python may deliver it, or by a timer.

Python runs signal handlers at certain instructions only: when a function begins, after a call, and
at the end of a loop's round.
"""

import contextlib
import dis
import functools
import gc
import itertools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import fastema

OURS = str(Path(fastema.__file__).parent)
ALSO = contextlib.__file__  # what makes a generator a context manager
CHECKED_AFTER = ("CALL", "RESUME")
NEAR_THE_ENDS = 25
"""Places at either end of a call that are all tried; with --full as many as NEAR_IN_FULL."""
NEAR_IN_FULL = 200


@functools.cache
def places(code: CodeType) -> frozenset[int]:
    """Offsets of a function's instructions before which a signal handler may run.

    What a handler raises after a call is handled where the call stands, and what a tracer raises
    where the next instruction stands: left out where these differ, as at the end of a ``with``.
    """
    instructions = list(dis.get_instructions(code))
    found = {instructions[0].offset}
    for one, following in itertools.pairwise(instructions):
        same = _handler(code, one.offset) == _handler(code, following.offset)
        if one.opname.startswith(CHECKED_AFTER) and same:
            found.add(following.offset)
        target = one.argval if one.opcode in dis.hasjrel or one.opcode in dis.hasjabs else None
        if target is not None and target <= one.offset:
            found.add(target)
    return frozenset(found)


def _handler(code: CodeType, offset: int) -> int | None:
    """Where an exception is handled that is raised at an instruction; before Python 3.11 None."""
    table = getattr(dis, "_parse_exception_table", lambda _: ())(code)
    return next((one.target for one in table if one.start <= offset < one.end), None)


class At:
    """A tracer that sends SIGINT at the k-th place it comes to, or at several from there on."""

    def __init__(self, k: int, times: int) -> None:
        self.left, self.times = k, times

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not (name.startswith(OURS) or name == ALSO):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in places(frame.f_code):
            self.left -= 1
            if -self.times < self.left <= 0:
                signal.raise_signal(signal.SIGINT)
        return self


def interrupted(k: int, call: Callable[[], object], times: int = 1) -> int:
    """Interrupt a call at its k-th place; return how many places it fell short of that.

    With 0 it is not interrupted, and the places are counted, negative.
    """
    before = sys.gettrace()
    tracer = At(k, times)
    # Where the tests run in the background, a shell has SIGINT ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.settrace(tracer)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
        signal.signal(signal.SIGINT, handler)
    return tracer.left


def every_place(call: Callable[[], object], check: Callable[[], object], times: int = 1) -> None:
    """Interrupt a call everywhere; of a long one's middle, at a hundred places at most."""
    many = -interrupted(0, call)
    check()
    assert many > 20
    apart = max(20, many // 100)
    for k in range(1, many + 1):
        if k < NEAR_THE_ENDS or k > many - NEAR_THE_ENDS or k % apart == 0:
            interrupted(k, call, times)
            check()


def rung_during(seconds: float, call: Callable[[], object]) -> bool:
    """Whether a timer rang, as KeyboardInterrupt in this thread, before the call was over."""
    armed = [True]

    def ring(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    collects = gc.isenabled()
    gc.disable()  # what a callback of the collector raises is not raised, but warned of
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        call()
        armed.clear()
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if collects:
            gc.enable()
    return False
