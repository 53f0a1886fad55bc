"""Compiled kernels on disk: a private folder, whose entries are read whole or not at all.

The folder's name is the hash of all kernel sources, so that an upgrade never runs old code. Its
place is the user's cache directory, where uninstallers look. Standard library only.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Final

from fastema.kernels.stamp import source_stamp

__all__ = ["SOURCE_STAMP", "entry", "folder", "read", "versions", "write"]

SOURCE_STAMP: Final = source_stamp()
"""Hash of the kernel sources as imported: an upgrade under a running process changes nothing."""

_MAGIC: Final = b"fastema kernel 1\n"
_HEAD: Final = len(_MAGIC) + hashlib.sha256().digest_size


def _roots() -> Iterator[Path]:
    if os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(os.environ["NUMBA_CACHE_DIR"]) / "fastema"
    if sys.platform == "win32":
        variable, default = "LOCALAPPDATA", Path("~", "AppData", "Local")
    else:
        variable, default = "XDG_CACHE_HOME", Path("~", ".cache")
    with suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get(variable) or default).expanduser() / "fastema"
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    with suppress(OSError):  # no temporary directory
        yield Path(tempfile.gettempdir()) / f"fastema-{owner}"


def _is_private(folder: Path) -> bool:
    """Return whether only this user can write to a folder: its entries are executed."""
    if not hasattr(os, "getuid"):
        return True
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def folder() -> Path | None:
    """Return the first cache folder that is writable and private; None if there is none."""
    for root in _roots():
        found = root / SOURCE_STAMP
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            found.mkdir(mode=0o700, exist_ok=True)
            with tempfile.TemporaryFile(dir=found):
                pass
            if _is_private(root) and _is_private(found):
                return found
        except OSError:
            continue
    return None


def entry(name: str, *depends: object, suffix: str) -> Path | None:
    """Return the path of a kernel that depends on ``depends`` and the kernel sources.

    None if no folder is writable.
    """
    into = folder()
    if into is None:
        return None
    content = repr((name, SOURCE_STAMP, depends)).encode()
    return into / f"{name}-{hashlib.sha256(content).hexdigest()[:24]}{suffix}"


@functools.cache
def versions(*distributions: str) -> tuple[str, ...]:
    """Return name and version of each distribution that is installed."""
    found = []
    for name in distributions:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return tuple(found)


def _make_header(body: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(body).digest()


def read(path: Path | None) -> bytes | None:
    """Return the content of an entry; None if the entry is missing or damaged."""
    if path is None:
        return None
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    body = stored[_HEAD:]
    return body if stored[:_HEAD] == _make_header(body) else None


def write(path: Path | None, body: bytes) -> None:
    """Write an entry atomically. If that fails, the next process compiles again."""
    if path is None:
        return
    with suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_make_header(body) + body)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
