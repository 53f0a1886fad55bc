"""The errors fastema raises: one base, each class also the built-in that fits.

Every check comes before the first write: a call that raises has changed nothing.
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
    "PeerError",
    "StateError",
    "StorageError",
]


class FastemaError(Exception):
    """Base of every error that fastema raises on purpose."""


class ArgumentError(FastemaError, ValueError):
    """A parameter has no valid value."""


class BridgeError(FastemaError, TypeError):
    """An object that no bridge knows, or that cannot be read or written."""


class DTypeError(FastemaError, TypeError):
    """A dtype, or a pair of dtypes, that has no kernel."""


class DeviceError(FastemaError, RuntimeError):
    """A GPU, its driver or its compilers that are missing or cannot be used."""


class LayoutError(FastemaError, ValueError):
    """Tensors that do not match each other, overlap, or are not what they were."""


class StateError(FastemaError, RuntimeError):
    """A call in the wrong state: swapped when it must not be, or the reverse."""


class CheckpointError(FastemaError, ValueError):
    """A saved state that does not fit what it is loaded into."""


class StorageError(CheckpointError, OSError):
    """A file that cannot be written; ``errno`` is the system's number, where it gave one."""


class NonFiniteError(FastemaError, FloatingPointError):
    """Weights hold a NaN or an infinity, and the average was told to raise."""


class PeerError(FastemaError, ImportError):
    """A peer's package is missing, or has an interface that is not known."""


def listed(problems: Iterable[str], limit: int = 20) -> str:
    """Return problems as the lines of one message, counting those beyond the limit."""
    lines = list(problems)
    shown = [f"  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)
