"""Numbers, for people."""

from __future__ import annotations

__all__ = ["figure", "size"]


def figure(value: float) -> str:
    """Write a number with three digits, without an exponent where it is large."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def size(nbytes: float) -> str:
    """Write a number of bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
