"""Imports of Lightning under its two names: ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any, Final

__all__ = ["LIGHTNING_MODULES", "PACKAGES", "Callback"]

PACKAGES: Final = ("lightning.pytorch", "pytorch_lightning")


def _import_installed() -> list[Any]:
    """Import every installed Lightning package.

    A trainer may come from either package, and accepts only callbacks of its own package.
    """
    found = []
    for package in PACKAGES:
        with suppress(ModuleNotFoundError):
            found.append(import_module(package))
    return found or [import_module(PACKAGES[0])]


LIGHTNING_MODULES: Final = _import_installed()

Callback: Any = type("Callback", tuple(one.Callback for one in LIGHTNING_MODULES), {})
"""Base class that is a callback in every installed Lightning package."""
