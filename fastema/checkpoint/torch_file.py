"""Read ``torch.save`` files without PyTorch and without running any code in them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from fastema.checkpoint import pickles
from fastema.checkpoint.files import LONGEST, FilePart, OpenFile, StoredTensor
from fastema.checkpoint.pickles import PickledTensor
from fastema.checkpoint.stretches import Contiguous, Place, Strided, extent
from fastema.errors import CheckpointError
from fastema.layout.dtypes import DTYPES, dtype

__all__ = [
    "MAGIC",
    "TorchFile",
    "check",
    "locate_tensor",
    "part_of",
    "read",
    "tensors_in",
]

MAGIC: Final = b"PK\3\4"
"""The first bytes of a file."""

_MOST_ENTRIES: Final = 1 << 22
"""Limit on the entries of mappings and lists to search for tensors."""

_PIECE: Final = 1 << 22
"""Bytes to read at a time when only verifying checksums."""

_DEEPEST: Final = 64
"""Limit on the nesting of mappings and lists."""


class TorchFile(NamedTuple):
    """A file's contents, with a :class:`PickledTensor` for each tensor, and its storages."""

    file: OpenFile
    content: Any
    storages: dict[str, tuple[int, int]]  # name to first byte in the file and length


def read(file: OpenFile, begin: int = 0, length: int | None = None) -> TorchFile:
    """Read the contents of a file, or of an archive in it, but no tensor data.

    Raise a CheckpointError if it is damaged or unsafe.
    """
    path, size = file.path, file.size - begin if length is None else length
    with _archive(file, begin, size) as (opened, archive):
        entries = {one.filename.partition("/")[2]: one for one in archive.infolist()}
        if "data.pkl" not in entries:
            raise CheckpointError(f"{path} is not a file of torch.save: it has no data.pkl")
        described = entries["data.pkl"]
        _refuse_compressed(path, described)
        if described.file_size > LONGEST:
            raise CheckpointError(f"{path}: its description is too long")
        if "byteorder" in entries and _content(archive, entries["byteorder"]) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine")
        content = pickles.load(_content(archive, described), pickles.TENSORS)
        storages = {}
        for name, one in entries.items():
            if name.startswith("data/"):
                _refuse_compressed(path, one)
                first = _data_of(opened, one.header_offset)
                if first + one.file_size > size:
                    raise CheckpointError(f"{path} was cut short")
                storages[name.removeprefix("data/")] = begin + first, one.file_size
    return TorchFile(file, content, storages)


def check(file: OpenFile, begin: int = 0, length: int | None = None) -> None:
    """Verify the checksums of a file, or of an archive in it; raise a CheckpointError."""
    with _archive(file, begin, length) as (_, archive):
        for one in archive.infolist():
            _refuse_compressed(file.path, one)
            with archive.open(one) as opened:
                while opened.read(_PIECE):
                    pass


@contextmanager
def _archive(
    file: OpenFile, begin: int, length: int | None
) -> Iterator[tuple[Any, zipfile.ZipFile]]:
    """Yield a file and its zip archive; turn any error in the block into a CheckpointError."""
    opened: Any = io.BufferedReader(FilePart(file, begin, length))
    try:
        with zipfile.ZipFile(opened) as archive:
            yield opened, archive
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {file.path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile and pickle raise many types
        raise CheckpointError(
            f"{file.path} is damaged, or not a file of torch.save: {error}"
        ) from None


def _refuse_compressed(path: Path, entry: zipfile.ZipInfo) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise CheckpointError(f"{path}: {entry.filename!r} is compressed, as torch.save never does")


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as opened:
        return opened.read(LONGEST)


def _data_of(file: Any, header: int) -> int:
    """Return the offset of a zip entry's data; raise a ValueError if its header is missing."""
    file.seek(header)
    head = file.read(30)
    if len(head) != 30 or head[:4] != b"PK\3\4":
        raise ValueError("an entry is not where the directory says")
    return (
        header + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    )


def part_of(content: Any, key: str, path: Path) -> Any:
    """Return the value at a dotted key; raise a CheckpointError if there is none."""
    for one in key.split("."):
        try:
            content = content[int(one) if isinstance(content, list | tuple) else one]
        except (KeyError, ValueError, IndexError, TypeError):
            raise CheckpointError(f"{path} has nothing at {key!r}") from None
    return content


def tensors_in(content: Any, kind: type = PickledTensor) -> dict[str, Any]:
    """Return the tensors in nested mappings and lists by dotted key."""
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
        raise CheckpointError(f"{prefix[:100]!r}...: mappings are nested too deeply")
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
        if next(left, None) is None:  # shared entries can make the walk exponentially long
            raise CheckpointError(f"{prefix[:100]!r}...: more entries than any checkpoint has")
        if isinstance(key, str | int):
            yield from _walk(value, kind, f"{prefix}{key}.", depth + 1, left)


def locate_tensor(name: str, tensor: PickledTensor, state: TorchFile) -> tuple[StoredTensor, Place]:
    """Return a tensor's dtype and shape, and where it lies in the file."""
    path = state.file.path
    if tensor.code not in DTYPES:
        raise CheckpointError(f"{path}: {name} has an unknown dtype: {tensor.code}")
    kind = dtype(tensor.code)
    stored = StoredTensor(kind, tensor.size)
    try:
        begin, size = state.storages[tensor.key]
    except KeyError:
        raise CheckpointError(f"{path}: the data of {name} is missing") from None
    first = tensor.offset * kind.itemsize
    if first + extent(tensor.size, tensor.strides) * kind.itemsize > size:
        raise CheckpointError(f"{path}: {name} is longer than its storage")
    if pickles.is_row_major(tensor):
        return stored, Contiguous(state.file, begin + first)
    return stored, Strided(state.file, begin + first, stored, tensor.strides)
