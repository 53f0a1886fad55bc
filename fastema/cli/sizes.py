"""Format numbers for people to read."""

from __future__ import annotations

from typing import Final

__all__ = ["LINE", "duration", "figure", "size"]

LINE: Final = 79
"""Longest line that the commands print, in characters, unless a name in it is longer."""


def figure(value: float) -> str:
    """Format a number with three digits; a large number has all its digits, not an exponent."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def size(nbytes: float) -> str:
    """Format a number of bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def duration(seconds: float) -> str:
    """Format a time with three digits, in seconds or milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
