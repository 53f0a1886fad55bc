"""Checks of the decays that users pass to drop-in classes."""

from __future__ import annotations

from typing import Any

from fastema.errors import ArgumentError, CheckpointError

__all__ = ["check_fraction"]


def check_fraction(
    value: Any, name: str, error: type[ArgumentError | CheckpointError] = ArgumentError
) -> None:
    """Raise ``error`` unless ``value`` is a number in [0, 1]; refer rules to fastema.EMA."""
    try:
        if not isinstance(value, str) and 0.0 <= value <= 1.0:
            return
    except (TypeError, ValueError, RuntimeError):
        pass
    changing = callable(value) or hasattr(value, "decay")
    raise error(
        f"{name}={value!r}: expected a number from 0 to 1"
        + ("; fastema.EMA takes the rules of fastema.rules as its decay" if changing else "")
    )
