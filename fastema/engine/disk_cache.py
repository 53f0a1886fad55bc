"""Compiled kernels on disk: a private folder, whose entries are read whole or not at all.

The folder's name is the hash of all kernel sources, so that an upgrade never runs old code. Its
place is the user's cache directory, where uninstallers look. Its entries are executed: on systems
whose files have owners, nobody but this user and root can change them or the way to them.
Standard library only.
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

_HAS_OWNERS: Final = hasattr(os, "geteuid")

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

_MOST_LINKS: Final = 40
"""As in Linux's own lookup of paths."""


def _roots() -> Iterator[Path]:
    if os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(os.environ["NUMBA_CACHE_DIR"]) / "fastema"
    if sys.platform == "win32":
        variable, default = "LOCALAPPDATA", Path("~", "AppData", "Local")
    else:
        variable, default = "XDG_CACHE_HOME", Path("~", ".cache")
    with suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get(variable) or default).expanduser() / "fastema"
    owner = os.geteuid() if _HAS_OWNERS else "user"
    with suppress(OSError):  # no temporary directory
        yield Path(tempfile.gettempdir()) / f"fastema-{owner}"


def _is_ours(status: os.stat_result) -> bool:
    """Return whether only this user and root can write to a file or folder."""
    if not _HAS_OWNERS:
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_WRITE


def _make_private(folder: Path) -> Path:
    """Create a folder and the missing ones above it; return its path without links.

    A PermissionError is raised unless this user and root alone can change what the path leads to:
    every folder and link on the way belongs to one of them, and others can write to none, or the
    folder is sticky, as /tmp is. So what was true when the path was checked remains true.
    """
    if not _HAS_OWNERS:  # Windows: a user's folders inherit an access list from the profile
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    trusted = {os.geteuid(), 0, os.lstat("/").st_uid}
    at, links = "/", 0
    left = [*reversed(Path(os.path.abspath(folder)).parts[1:])]
    while left:
        part = left.pop()
        at = os.path.dirname(at) if part == ".." else os.path.join(at, part)
        try:
            status = os.lstat(at)
        except FileNotFoundError:
            with suppress(FileExistsError):  # another process was faster
                os.mkdir(at, 0o700)
            status = os.lstat(at)
        if status.st_uid not in trusted:
            raise PermissionError(f"{at} belongs to another user")
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise OSError(f"{folder} leads through too many links")
            target = Path(os.readlink(at))
            at = "/" if target.is_absolute() else os.path.dirname(at)
            left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        elif status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX:
            raise PermissionError(f"others can write to {at}")
    if not _is_ours(os.lstat(at)):
        raise PermissionError(f"{at} is not private to this user")
    return Path(at)


@functools.cache
def folder() -> Path | None:
    """Return the first cache folder that is writable and private; None if there is none."""
    for root in _roots():
        try:
            found = _make_private(root / SOURCE_STAMP)
            with tempfile.TemporaryFile(dir=found):
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


def _open_entry(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def read(path: Path | None) -> bytes | None:
    """Return the content of an entry; None if it is missing, damaged, a link or another user's."""
    if path is None:
        return None
    try:
        with open(path, "rb", opener=_open_entry) as file:
            stored = file.read() if _is_ours(os.fstat(file.fileno())) else b""
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
