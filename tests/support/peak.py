"""The peak resident memory of this process since a chosen moment."""

import resource
from contextlib import suppress
from pathlib import Path

KILOBYTE = 1024

_forgotten = [0]


def reset_peak() -> int:
    """Reset the peak, where Linux allows it; return the number of resident bytes."""
    _forgotten[0] = overall_peak()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def peak() -> int:
    """Return the largest number of resident bytes since :func:`reset_peak`."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KILOBYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE


def overall_peak() -> int:
    """Return the largest number of resident bytes since the process started."""
    return max(*_forgotten, peak())
