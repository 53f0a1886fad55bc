"""timm, and its models, where torchvision is missing: its names are there, and nothing behind them.

timm asks for torchvision, of which a build for another torch breaks more than it gives. Its models
and averages use nothing of it but the name of a class.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["stand_in"]


class _Enumeration(type):
    """Of classes with a member for every name that is asked for."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Names(ModuleType):
    """Has a class for every name that is asked for."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        vars(self)[name] = made = _Enumeration(name, (), {})
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = fullname.partition(".")[0] == "torchvision"
        return ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in() -> None:
    """Let ``import timm`` pass without torchvision; where it is installed, nothing is done.

    For processes that import nothing else that looks for torchvision, which they would find.
    """
    if find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())
