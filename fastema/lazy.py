"""Package attributes that are imported on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, str], missing: type[Exception] = AttributeError
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` for a package whose names are imported on first use.

    A name whose framework is not installed raises ``missing``: by default an AttributeError, so
    that ``hasattr``, ``inspect.getmembers`` and ``help`` work everywhere. ``homes`` maps each name
    to the module that defines it, and the name of a submodule to the submodule itself.
    """
    space = sys.modules[package].__dict__

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        try:
            module = import_module(home)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("fastema"):
                raise
            raise missing(
                f"{package}.{name} needs the package {error.name!r}, which is not installed"
            ) from error
        space[name] = module if home == f"{package}.{name}" else getattr(module, name)
        return space[name]

    def names() -> list[str]:
        return sorted({*space, *space["__all__"]})

    return get, names
