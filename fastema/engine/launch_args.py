"""What changes from run to run of a program."""

from __future__ import annotations

from typing import Any

from fastema.errors import ArgumentError
from fastema.layout.home import LaunchArgs

__all__ = ["LaunchArgs", "checked_seed"]


def checked_seed(seed: Any) -> int:
    """A seed that fits the control block.

    Raises
    ------
    ArgumentError
        For anything but a whole number from 0 to 2**63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ArgumentError(f"seed={seed!r}: expected a whole number from 0 to 2**63 - 1")
    return seed
