"""The hash of the kernel sources, which identifies the sources that compiled kernels belong to.

Standard library only: the wheel build reads it without Numba.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def source_stamp() -> str:
    """Return sixteen hex digits that change with any edit to any kernel source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
