"""Exceptions raised by fastema: one base class; each also derives from a built-in exception.

All checks run before the first write: a call that raises has changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "BridgeError",
    "CheckpointError",
    "DTypeError",
    "DeviceError",
    "FastemaError",
    "LayoutError",
    "NonFiniteError",
    "OptionError",
    "PeerError",
    "StateError",
    "StorageError",
]


class FastemaError(Exception):
    """Base class of every error that fastema raises on purpose."""


class ArgumentError(FastemaError, ValueError):
    """An argument has an invalid value."""


class OptionError(ArgumentError, TypeError):
    """A function was called with an option that it does not have."""


class BridgeError(FastemaError, TypeError):
    """An object belongs to no supported framework, or cannot be read or written."""


class DTypeError(FastemaError, TypeError):
    """A dtype, or a pair of dtypes, has no kernel."""


class DeviceError(FastemaError, RuntimeError):
    """A GPU, its driver or its compiler is missing or cannot be used."""


class LayoutError(FastemaError, ValueError):
    """Tensors do not match each other, overlap, or have changed."""


class StateError(FastemaError, RuntimeError):
    """A call was made in the wrong state: while weights are swapped, or while they are not."""


class CheckpointError(FastemaError, ValueError):
    """A saved state does not fit the object that it is loaded into."""


class StorageError(CheckpointError, OSError):
    """A file cannot be written; ``errno`` is the system's error number, if it gave one."""


class NonFiniteError(FastemaError, FloatingPointError):
    """Weights hold a NaN or an infinity, and the average is set to raise."""


class PeerError(FastemaError, ImportError):
    """A peer library is missing, or its interface is unknown."""


def format_problems(problems: Iterable[str], limit: int = 20) -> str:
    """Return problems as a bulleted list for a message; count those beyond ``limit``."""
    lines = list(problems)
    shown = [f"  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)
