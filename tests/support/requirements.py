"""Requirements of tests: a missing one skips the test, or fails it in continuous integration.

CI installs all dependencies, so a skipped test would go unnoticed there.
"""

import ast
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

__all__ = ["find_missing_packages", "require", "require_packages"]


@cache
def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def require(found: object, what: str) -> None:
    """Skip the test, or the module that calls this at its top, unless ``found`` is true."""
    if not found:
        if "CI" in os.environ:
            pytest.fail(f"{what} is missing", pytrace=False)
        pytest.skip(f"{what} is missing", allow_module_level=True)


def require_packages(*names: str) -> None:
    """Skip the test unless all named packages can be imported."""
    for name in names:
        require(_is_installed(name), name)


@cache
def find_missing_packages(path: Path) -> tuple[str, ...]:
    """Return the packages that a test file imports or lists in ``NEEDS`` but are missing."""
    return tuple(sorted({name for name in _iterate_imports(path) if not _is_installed(name)}))


def _iterate_imports(path: Path) -> Iterator[str]:
    """Yield the packages that a file needs, directly or through its relative imports."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Import(names):
                yield from (one.name for one in names if not one.name.startswith("fastema"))
            case ast.ImportFrom(module, _, level) if level:
                folder = path.parents[level - 1]
                parts = (module or "").split(".")
                below = folder.joinpath(*parts[:-1], f"{parts[-1]}.py")
                if below.is_file():
                    yield from find_missing_packages(below)
            case ast.ImportFrom(str(module)) if not module.startswith("fastema"):
                yield module.split(".")[0]
            case ast.Assign([ast.Name("NEEDS")], ast.Tuple(elements)):
                yield from (one.value for one in elements if isinstance(one, ast.Constant))
