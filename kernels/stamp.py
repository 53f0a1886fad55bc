"""The hash of the kernel sources, which identifies the sources that compiled kernels belong to.

Standard library only: the wheel build reads it without Numba.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any


def source_stamp() -> str:
    """Return sixteen hex digits that change with any edit to any kernel source.

    Without source files (a zip archive, ``.pyc`` files alone, a frozen program) they change with
    what is imported instead: the archive's files, or the modules' bytecode.
    """
    digest = hashlib.sha256()
    sources = {path.name: path.read_bytes() for path in Path(__file__).parent.glob("*.py")}
    for name, content in sorted(sources.items() or _read_modules()):
        digest.update(name.encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _read_modules() -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the package's modules, as their loaders have them.

    fastema's version comes first: it must do where a loader does not list its modules.
    """
    import pkgutil
    from importlib.util import find_spec

    package = __name__.rpartition(".")[0]
    yield "", str(getattr(sys.modules[package.partition(".")[0]], "__version__", "")).encode()
    for module in pkgutil.iter_modules(sys.modules[package].__path__, f"{package}."):
        spec: Any = find_spec(module.name)
        loader = spec.loader
        try:
            yield module.name, loader.get_data(spec.origin)
        except (AttributeError, TypeError, OSError):  # no such method, or no file
            yield module.name, _describe(loader.get_code(module.name)).encode()


def _describe(value: object) -> str:
    """Return code and constants as text that is the same in every process."""
    if isinstance(value, CodeType):
        consts = _describe(value.co_consts)
        return repr((value.co_name, value.co_code, value.co_names, value.co_varnames, consts))
    if isinstance(value, tuple | frozenset):
        items = map(_describe, value)
        return repr(list(items) if isinstance(value, tuple) else sorted(items))
    return repr(value)
