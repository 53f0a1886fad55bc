"""Imports of Lightning under its two names: ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, Final

__all__ = ["LIGHTNING_MODULES", "PACKAGES", "Callback", "replace_method"]

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


def replace_method(owner: Any, name: str, call: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of one object by ``call(method, *args)``; return a function that undoes it.

    The undoing does nothing if something else has replaced the method since.
    """
    inner, was_replaced = getattr(owner, name), name in vars(owner)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return call(inner, *args, **kwargs)

    def undo() -> None:
        if vars(owner).get(name) is not replacement:
            return
        if was_replaced:
            setattr(owner, name, inner)
        else:
            delattr(owner, name)

    setattr(owner, name, replacement)
    return undo
