"""Import timm and its models without torchvision, by an empty stand-in for torchvision.

timm imports torchvision, whose builds for another version of torch fail. timm's models and averages
use only the name of one of its classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["stand_in"]


class _StubMeta(type):
    """A metaclass that gives its classes a member for every requested name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _StubModule(ModuleType):
    """A module with a class for every requested name."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        vars(self)[name] = made = _StubMeta(name, (), {})
        return made


class _StubFinder(MetaPathFinder, Loader):
    """Finds and loads ``torchvision`` and its submodules as `_StubModule`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = fullname.partition(".")[0] == "torchvision"
        return ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in() -> None:
    """Make ``import timm`` work without torchvision. Do nothing if torchvision is installed.

    Use it only in processes where no other package checks for torchvision: it would find the
    stand-in.
    """
    if find_spec("torchvision") is None:
        sys.meta_path.append(_StubFinder())
