"""The work that a call does, as a machine-independent count."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import fastema
from fastema.engine import watch
from fastema.kernels.watch_table import TENSORS

PACKAGE = fastema.__path__[0]


def count_lines(call: Callable[[], Any]) -> int:
    """Count the lines of fastema's Python that a call executes.

    Each tensor that the compiled check inspects counts as one line.
    """
    lines = 0

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        if event == "call" and frame.f_code is watch._CompiledWatch.changed.__code__:
            lines += int(frame.f_locals["self"].tables[0][TENSORS])
        return line

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        return line(frame, event, arg) if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def grows_linearly(call_of: Callable[[int], Callable[[], Any]], count: int = 40) -> bool:
    """Return whether the work of the calls from ``call_of(count)`` is linear in ``count``."""
    count_lines(call_of(count))  # one-time work
    small, middle, large = (count_lines(call_of(count * k)) for k in (1, 2, 4))
    assert middle > small  # the count is not trivial
    # Linear work doubles; comparing each tensor with all others would quadruple it.
    return large - middle < 2.1 * (middle - small)
