"""Files of ``torch.save``, read without PyTorch and without running anything in them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from fastema.checkpoint import pickles
from fastema.checkpoint.files import StoredTensor
from fastema.checkpoint.pickles import Rebuilt
from fastema.errors import CheckpointError
from fastema.layout.dtypes import DTYPES, dtype

__all__ = ["State", "check", "data_of", "part_of", "place_of", "read", "tensors_in"]

_LONGEST: Final = 1 << 28
"""Bytes of a description that are still read."""

_MOST_ENTRIES: Final = 1 << 22
"""Entries of mappings and lists that are looked into."""

_PIECE: Final = 1 << 22
"""Bytes that are read at a time where they are only looked at."""

_DEEPEST: Final = 64
"""Mappings within mappings that are looked into."""


class State(NamedTuple):
    """What a file holds: its description with :class:`Rebuilt` for tensors, and its storages."""

    content: Any
    storages: dict[str, tuple[int, int]]  # first byte in the file, and bytes


def read(path: Path) -> State:
    """Read the description of a file; a CheckpointError if it is damaged or would run code."""
    with _archive(path) as (file, archive):
        size = path.stat().st_size
        entries = {one.filename.partition("/")[2]: one for one in archive.infolist()}
        if "data.pkl" not in entries:
            raise CheckpointError(f"{path} is no file of torch.save: it has no data.pkl")
        described = entries["data.pkl"]
        _refuse_compressed(path, described)
        if described.file_size > _LONGEST:
            raise CheckpointError(f"{path}: its description is longer than any")
        if "byteorder" in entries and _content(archive, entries["byteorder"]) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine")
        content = pickles.load(_content(archive, described), pickles.TENSORS)
        storages = {}
        for name, one in entries.items():
            if name.startswith("data/"):
                _refuse_compressed(path, one)
                begin = data_of(file, one.header_offset)
                if begin + one.file_size > size:
                    raise CheckpointError(f"{path} was cut short")
                storages[name.removeprefix("data/")] = begin, one.file_size
    return State(content, storages)


def check(path: Path) -> None:
    """Read a whole file and compare its checksums; a CheckpointError if one differs."""
    with _archive(path) as (_, archive):
        for one in archive.infolist():
            _refuse_compressed(path, one)
            with archive.open(one) as opened:
                while opened.read(_PIECE):
                    pass


@contextmanager
def _archive(path: Path) -> Iterator[tuple[Any, zipfile.ZipFile]]:
    """Open a file, and as a zip; any error in the block becomes a CheckpointError."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield file, archive
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # of zipfile and pickle, which have errors of many kinds
        raise CheckpointError(f"{path} is damaged, or no file of torch.save: {error}") from None


def _refuse_compressed(path: Path, entry: zipfile.ZipInfo) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise CheckpointError(f"{path}: {entry.filename!r} is compressed, as torch.save never does")


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as opened:
        return opened.read(_LONGEST)


def data_of(file: Any, header: int) -> int:
    """Return the first byte of a zip entry, behind its header; a ValueError if none is there."""
    file.seek(header)
    head = file.read(30)
    if len(head) != 30 or head[:4] != b"PK\3\4":
        raise ValueError("an entry is not where the directory says")
    return (
        header + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    )


def part_of(content: Any, key: str, path: Path) -> Any:
    """Return what lies at a key with dots; a CheckpointError if there is nothing."""
    for one in key.split("."):
        try:
            content = content[int(one) if isinstance(content, list | tuple) else one]
        except (KeyError, ValueError, IndexError, TypeError):
            raise CheckpointError(f"{path} has nothing at {key!r}") from None
    return content


def tensors_in(content: Any, kind: type = Rebuilt) -> dict[str, Any]:
    """Return the tensors in nested mappings and lists, by their keys with dots between them."""
    found: dict[str, Any] = {}
    for name, one in _walk(content, kind, "", 0, iter(range(_MOST_ENTRIES))):
        if name in found:
            raise CheckpointError(f"two tensors are called {name!r}")
        found[name] = one
    return found


def _walk(
    content: Any, kind: type, prefix: str, depth: int, left: Iterator[int]
) -> Iterator[tuple[str, Any]]:
    if depth > _DEEPEST:
        raise CheckpointError(f"{prefix[:100]!r}...: mappings within mappings without end")
    if isinstance(content, kind):
        yield prefix.removesuffix("."), content
        return
    if isinstance(content, dict):
        items: Any = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    else:
        return
    for key, value in items:
        if next(left, None) is None:  # what holds the same twice, and so on, has no end
            raise CheckpointError(f"{prefix[:100]!r}...: more entries than any checkpoint has")
        if isinstance(key, str | int):
            yield from _walk(value, kind, f"{prefix}{key}.", depth + 1, left)


def place_of(path: Path, name: str, tensor: Rebuilt, state: State) -> tuple[StoredTensor, int]:
    """Return a tensor's dtype and shape, and its first byte in the file."""
    if tensor.code not in DTYPES:
        raise CheckpointError(f"{path}: {name} is of a dtype that is not known: {tensor.code}")
    kind = dtype(tensor.code)
    stored = StoredTensor(kind, tensor.size)
    if not pickles.is_row_major(tensor):
        raise CheckpointError(
            f"{path}: {name} is not row-major (strides {list(tensor.strides)}); save it with "
            ".contiguous()"
        )
    try:
        begin, size = state.storages[tensor.key]
    except KeyError:
        raise CheckpointError(f"{path}: the numbers of {name} are not there") from None
    first = tensor.offset * kind.itemsize
    if first + stored.nbytes > size:
        raise CheckpointError(f"{path}: {name} is longer than what is stored of it")
    return stored, begin + first
