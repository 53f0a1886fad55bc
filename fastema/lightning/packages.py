"""Lightning under its two names: ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any, Final

__all__ = ["LIGHTNINGS", "PACKAGES", "Callback"]

PACKAGES: Final = ("lightning.pytorch", "pytorch_lightning")


def _installed() -> list[Any]:
    """Import every Lightning there is: a trainer may be of either, and each knows its own only."""
    found = []
    for package in PACKAGES:
        with suppress(ModuleNotFoundError):
            found.append(import_module(package))
    return found or [import_module(PACKAGES[0])]


LIGHTNINGS: Final = _installed()

Callback: Any = type("Callback", tuple(one.Callback for one in LIGHTNINGS), {})
"""A callback of all of them."""
