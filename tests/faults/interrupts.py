"""KeyboardInterrupt at every place where Python may deliver it, or from a timer.

Python runs signal handlers only at certain instructions: at the start of a function, after a call,
and at the end of a loop iteration.
"""

import _thread
import contextlib
import dis
import functools
import gc
import itertools
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import fastema

OURS = str(Path(fastema.__file__).parent)
ALSO = contextlib.__file__  # contextlib runs generators as context managers
CHECKED_AFTER = ("CALL", "RESUME")
NEAR_THE_ENDS = 25
"""Try all of this many places at either end of a call; --full tries NEAR_IN_FULL."""
NEAR_IN_FULL = 200
TOGETHER = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Python 3.10 also runs handlers before an except clause"
)
LAST: list[KeyboardInterrupt] = []
"""The last interrupt: as in an ``except`` clause, it keeps alive what its traceback refers to."""


@functools.cache
def find_places(code: CodeType) -> frozenset[int]:
    """Return the offsets of instructions before which a signal handler may run.

    A handler after a call raises at the call, but a tracer raises at the next instruction. Leave
    out places where the two have different exception handlers, as at the end of a ``with``.
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
    """Return the offset of an instruction's exception handler; None before Python 3.11."""
    table = getattr(dis, "_parse_exception_table", lambda _: ())(code)
    return next((one.target for one in table if one.start <= offset < one.end), None)


class At:
    """A tracer that sends SIGINT at the k-th place it reaches, after other signals."""

    def __init__(self, k: int, others: Sequence[int]) -> None:
        self.left, self.others = k, others

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not (name.startswith(OURS) or name == ALSO):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in find_places(frame.f_code):
            self.left -= 1
            if not self.left:
                # Only note them: their handlers raise one by one, after that of SIGINT.
                [*map(_thread.interrupt_main, self.others)]
                signal.raise_signal(signal.SIGINT)
        return self


def interrupt(k: int, call: Callable[[], object], others: Sequence[int] = ()) -> int:
    """Interrupt a call at its k-th place; return ``k`` minus the number of places reached.

    With ``k = 0``, do not interrupt it, and return the number of places, negated. ``others`` are
    signals that arrive together with SIGINT; their handlers raise too.
    """
    armed = True

    def fail(number: int, frame: FrameType | None) -> None:
        if armed:
            raise KeyboardInterrupt

    before = sys.gettrace()
    tracer = At(k, others)
    # A shell makes background processes ignore SIGINT.
    handlers = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    handlers |= {number: signal.signal(number, fail) for number in others}
    sys.settrace(tracer)
    try:
        try:
            call()
        finally:  # in Python 3.10 another handler may raise before the next line
            armed = False
    except KeyboardInterrupt as error:
        LAST[:] = [error]
    finally:
        sys.settrace(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return tracer.left


def interrupt_each(call: Callable[[], object], check: Callable[[], object]) -> None:
    """Interrupt a call at every place, but at most about 100 in the middle of a long call."""
    many = -interrupt(0, call)
    check()
    assert many > 20
    apart = max(20, many // 100)
    for k in range(1, many + 1):
        if k < NEAR_THE_ENDS or k > many - NEAR_THE_ENDS or k % apart == 0:
            interrupt(k, call)
            check()


def interrupt_everywhere(
    call: Callable[[], object], check: Callable[[], object], others: Sequence[int] = ()
) -> None:
    """Interrupt a short call at every place, see :func:`interrupt`."""
    many = -interrupt(0, call)
    check()
    assert many > 20
    for k in range(1, many + 1):
        interrupt(k, call, others)
        check()


def interrupt_after(seconds: float, call: Callable[[], object]) -> bool:
    """Interrupt a call by a timer; return whether it rang before the call ended."""
    armed = [True]

    def ring(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    collects = gc.isenabled()
    gc.disable()  # the collector only warns of exceptions in its callbacks
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
