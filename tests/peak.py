"""The most memory that a process has had since a moment."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

KILOBYTE = 1024


def forget_peak() -> int:
    """Bytes that are resident now; what was more than that before is forgotten, where Linux can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def peak() -> int:
    """The largest number of resident bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KILOBYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE
