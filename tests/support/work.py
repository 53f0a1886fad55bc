"""How much work a call is, as a number that no machine changes."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from fastema.engine import watch
from fastema.kernels.watch_table import TENSORS


def lines_of(call: Callable[[], Any]) -> int:
    """Lines of fastema's Python that a call runs, each as often as it runs.

    What the compiled check of tensors looks at counts as well.
    """
    lines = 0

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        if event == "call" and frame.f_code is watch._CompiledWatch._any_moved.__code__:
            watched = frame.f_locals
            lines += watched["self"]._tasks[watched["share"]][1][TENSORS]
        return line

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if "fastema" not in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
            return None
        return line(frame, event, arg)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def grows_linearly(call_of: Callable[[int], Callable[[], Any]], count: int = 40) -> bool:
    """Whether twice the tensors are twice the work, in the calls that ``call_of(count)`` makes."""
    lines_of(call_of(count))  # what is done once
    small, middle, large = (lines_of(call_of(count * k)) for k in (1, 2, 4))
    assert middle > small  # there is something to count
    # Twice as much; where each tensor is compared with all others, up to four times.
    return large - middle < 2.1 * (middle - small)
