"""Write safetensors files atomically, and read them in parts.

The format is eight bytes with the length of a JSON header, the header, and the tensors' bytes in
row-major order; see https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from fastema.errors import CheckpointError, StorageError
from fastema.layout.dtypes import DType, dtype
from fastema.layout.flat import row_major
from fastema.layout.spec import TensorSpec

__all__ = [
    "LONGEST",
    "File",
    "FileChangedError",
    "FilePart",
    "OpenFile",
    "Read",
    "StoredTensor",
    "atomic_write_path",
    "check_extents",
    "check_shape",
    "fsync",
    "header_of",
    "parse",
    "partial_path",
    "pieces_of",
    "read",
    "refuse_ending",
    "remove_abandoned",
    "retrying",
    "wrap_write_errors",
    "write",
]

Read = Callable[[str, int, memoryview], None]
"""``read(name, first, buffer)``: fill the buffer with a tensor's row-major bytes from ``first``."""

_NAMES: Final = {
    **{code: code.upper() for code in ("f64", "f32", "f16", "bf16", "c64", "bool")},
    **{f"{sign}{bits}": f"{sign}{bits}".upper() for sign in "iu" for bits in (8, 16, 32, 64)},
    "f8e4m3fn": "F8_E4M3",
    "f8e5m2": "F8_E5M2",
    "f8e4m3fnuz": "F8_E4M3FNUZ",
    "f8e5m2fnuz": "F8_E5M2FNUZ",
    "f8e8m0fnu": "F8_E8M0",
}
"""Dtype code to its name in a safetensors header."""

_CODES: Final = {in_header: code for code, in_header in _NAMES.items()}

LONGEST: Final = 1 << 28
"""Size limit in bytes of what describes tensors: a header, an index or a pickle."""

_METADATA: Final = "__metadata__"
"""Key of the metadata in a safetensors header."""

_MOST: Final = 2**63 - 1
"""The largest extent or offset."""

_MOST_AXES: Final = 32
"""Limit on the axes of a tensor, as in NumPy 1."""

_PARTIAL: Final = re.compile(r"\..+\.fastema-[0-9a-f]{12}\..+", re.DOTALL)
"""Names of partial files and folders: being written, or left behind by a killed process."""

_ABANDONED_S: Final = 24 * 3600.0
"""Seconds without a write after which a partial file or folder is one of a killed process."""

_MOST_OPEN: Final = 256
"""Limit on the files that stay open."""

_PIECE: Final = 1 << 22
"""Bytes to read at a time when copying or verifying."""

_ATTEMPTS: Final = 8
"""Times to open several files again that belong together, if one is replaced meanwhile."""

Found = TypeVar("Found")

_seeking = threading.Lock()
"""Lock for reads on systems without positioned reads."""


class StoredTensor(NamedTuple):
    """A tensor that is in a file or is about to be written to one."""

    kind: DType
    shape: tuple[int, ...]
    offset: int = 0  # of its first byte in the file; its elements are row-major

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of all elements in bytes."""
        return self.size * self.kind.itemsize


def pieces_of(read: Read, name: str, tensor: StoredTensor) -> Iterator[tuple[int, memoryview]]:
    """Yield a tensor's bytes in pieces, each with its first byte, in a buffer that is reused."""
    buffer = memoryview(bytearray(min(_PIECE, tensor.nbytes)))
    for first in range(0, tensor.nbytes, _PIECE):
        part = buffer[: tensor.nbytes - first]
        read(name, first, part)
        yield first, part


class FileChangedError(CheckpointError):
    """Raised when a file is replaced or changed between two reads."""


class OpenFile:
    """A regular file, opened for reading.

    It stays open while the object lives, so that it is read as it was found even if another file
    takes its path. Of many files only the first :data:`_MOST_OPEN` stay open; the others are opened
    for each read.

    Raises
    ------
    CheckpointError
        If the file is missing or is not a regular file.
    FileChangedError
        By :meth:`read` or :meth:`refuse_changes`, if it was rewritten, or replaced while closed.
    """

    _kept: ClassVar[set[int]] = set()  # handles of files that stay open

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.kept: tuple[Any, Any] = (None, None)
        """What was read of a strided tensor last, and the data; guarded by ``lock``."""
        self._handle: int | None = None
        handle = self._open_now()
        self.version = _version_of(os.fstat(handle))
        if len(self._kept) < _room():
            self._kept.add(handle)
            self._handle = handle
            weakref.finalize(self, _close, handle)
        else:
            os.close(handle)

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.version[2]

    def _open_now(self) -> int:
        flags = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # no wait for a pipe
        try:
            handle = os.open(self.path, os.O_RDONLY | flags)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise CheckpointError(f"{self.path} is not a file")
        return handle

    @contextmanager
    def _opened(self) -> Iterator[int]:
        if self._handle is not None:
            yield self._handle
            return
        handle = self._open_now()
        try:
            self._compare(os.fstat(handle))
            yield handle
        finally:
            os.close(handle)

    def _compare(self, found: os.stat_result) -> None:
        if _version_of(found) != self.version:
            raise FileChangedError(f"{self.path} was changed while it was read; read it again")

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the file's bytes from an offset on; any thread may call this."""
        if self._handle is None:
            with self._opened() as handle:
                self._fill(handle, offset, buffer)
        else:  # a context manager would cost more than the system call
            self._fill(self._handle, offset, buffer)

    def _fill(self, handle: int, offset: int, buffer: memoryview) -> None:
        while buffer:
            count = _read_at(handle, offset, buffer)
            if not count:
                raise CheckpointError(f"{self.path} was cut short")
            offset, buffer = offset + count, buffer[count:]

    def read_whole(self) -> bytes:
        """Read a description; raise a CheckpointError if it is larger than :data:`LONGEST`."""
        if self.size > LONGEST:
            raise CheckpointError(f"{self.path} is too long for a description")
        content = bytearray(self.size)
        self.read(0, memoryview(content))
        self.refuse_changes()
        return bytes(content)

    def starts_with(self, magic: bytes) -> bool:
        """Return whether the file begins with these bytes."""
        found = bytearray(len(magic))
        if self.size < len(magic):
            return False
        self.read(0, memoryview(found))
        return found == magic

    def refuse_changes(self, *, path: bool = False) -> None:
        """Raise a FileChangedError if the file was rewritten, or, with ``path``, if it moved."""
        if path:
            try:
                self._compare(self.path.stat())
            except OSError:
                raise FileChangedError(f"{self.path} was removed while it was read") from None
            return
        with self._opened() as handle:
            self._compare(os.fstat(handle))


def _room() -> int:
    """Return how many files may stay open: a quarter of the process' limit at most."""
    if os.name != "posix":  # Windows replaces no open file
        return 0
    limit = os.sysconf("SC_OPEN_MAX")
    return _MOST_OPEN if limit < 0 else min(_MOST_OPEN, limit // 4)


def _close(handle: int) -> None:
    OpenFile._kept.discard(handle)
    os.close(handle)


def _version_of(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_at(handle: int, offset: int, buffer: memoryview) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(handle, [buffer], offset)
    with _seeking:
        os.lseek(handle, offset, os.SEEK_SET)
        data = os.read(handle, len(buffer))
    buffer[: len(data)] = data
    return len(data)


class FilePart(io.RawIOBase):
    """A byte range of a file as a read-only file."""

    def __init__(self, file: OpenFile, begin: int = 0, length: int | None = None) -> None:
        self._file, self._begin, self._at = file, begin, 0
        self._length = file.size - begin if length is None else length

    def readable(self) -> bool:
        """See :class:`io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See :class:`io.RawIOBase`."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See :class:`io.RawIOBase`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """See :class:`io.RawIOBase`."""
        at = self._begin + self._at
        room = min(len(buffer), self._length - self._at, self._file.size - at)
        if room <= 0:
            return 0
        self._file.read(at, memoryview(buffer)[:room])
        self._at += room
        return room


def retrying(call: Callable[[], Found]) -> Found:
    """Call a function that opens several files, again if one of them is replaced meanwhile."""
    for _ in range(_ATTEMPTS):
        with suppress(FileChangedError):
            return call()
    return call()


class File(NamedTuple):
    """A safetensors file whose header has been read."""

    source: OpenFile
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @property
    def path(self) -> Path:
        """Where the file was found."""
        return self.source.path

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """Yield a function that reads; raise a FileChangedError if the file is rewritten."""
        self.source.refuse_changes()
        yield lambda name, first, buffer: self.source.read(
            self.tensors[name].offset + first, buffer
        )
        self.source.refuse_changes()


def write(path: str | os.PathLike[str], tensors: Mapping[str, TensorSpec], **metadata: str) -> None:
    """Write tensors and metadata to a safetensors file, which is replaced atomically.

    The folder must exist. Each tensor must be contiguous, row-major and in CPU memory.
    """
    for name, spec in tensors.items():
        if spec.division is not None:
            raise CheckpointError(
                f"{name}: this process holds only a part of it; save with "
                "torch.distributed.checkpoint, or write one folder with "
                "fastema.distributed.consolidate"
            )
        if spec.device != "cpu" or (spec.size and spec.strides != row_major(spec.shape)):
            raise CheckpointError(f"{name}: {spec} is not row-major in CPU memory")
    # Largest items first, so that every element is aligned to its size.
    names = sorted(tensors, key=lambda name: (-tensors[name].kind.itemsize, name))
    header = header_of({name: tensors[name] for name in names}, metadata)
    with atomic_write_path(path) as partial, open(partial, "xb") as opened:
        opened.write(header)
        for name in names:
            opened.write(tensors[name].bytes())


def header_of(
    tensors: Mapping[str, StoredTensor | TensorSpec], metadata: Mapping[str, str]
) -> bytes:
    """Return the header of a safetensors file that holds these tensors in this order.

    Raise a CheckpointError for a name or a dtype that the format cannot store.
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        code, shape = tensor.kind.code, list(tensor.shape)
        if name == _METADATA or not _encodable(name):
            raise CheckpointError(f"{name!r}: no safetensors file can hold a tensor of this name")
        if code not in _NAMES:
            raise CheckpointError(f"{name}: safetensors has no dtype for {code}{shape}")
        end = offset + tensor.nbytes
        entries[name] = {"dtype": _NAMES[code], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def wrap_write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError in the block into a StorageError that names the path."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        ours = StorageError(f"cannot write {os.fspath(path)}: {error.strerror or error}")
        ours.errno = error.errno
        raise ours from error


def refuse_ending(path: Path, *, torch: bool = False) -> None:
    """Raise a CheckpointError if a path has the extension of the other format."""
    kind, ending = ("of torch.save", ".pt") if torch else ("in safetensors", ".safetensors")
    if path.suffix in ((".safetensors",) if torch else (".pt", ".pth", ".bin", ".ckpt")):
        raise CheckpointError(f"{path} would be a file {kind}: use a name that ends in {ending}")


@contextmanager
def atomic_write_path(path: str | os.PathLike[str], suffix: str = ".part") -> Iterator[str]:
    """Yield a temporary path to write; rename it to ``path`` on success, delete it on failure.

    The temporary name is like no other: any number of processes may write to a folder, and the last
    one to finish decides what ``path`` holds. Raise a StorageError if the file cannot be written.
    """
    final = Path(path)
    if not final.name or "\0" in final.name:
        raise StorageError(f"{os.fspath(path)!r} is not a file name")
    if final.exists() and not final.is_file():
        raise StorageError(f"{final} is not a file, and will not be replaced by one")
    remove_abandoned(final.parent)
    # Not from tempfile, whose files do not have the default permissions.
    partial = partial_path(final, suffix)
    with wrap_write_errors(final):
        try:
            yield os.fspath(partial)
            fsync(partial)
            os.replace(partial, final)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        with suppress(OSError):  # not every system can synchronize a folder
            fsync(final.parent)


def partial_path(final: Path, suffix: str = ".part") -> Path:
    """Return a new path beside ``final`` to write to before it is renamed."""
    return final.with_name(f".{final.name}.fastema-{secrets.token_hex(6)}{suffix}")


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left in a folder: not written to for a day."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PARTIAL.fullmatch(entry.name) and not entry.is_symlink():
                with suppress(OSError):
                    _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(path: Path) -> None:
    parts = [path, *(path.iterdir() if path.is_dir() else ())]
    if time.time() - max(one.stat().st_mtime for one in parts) < _ABANDONED_S:
        return
    # Rename it first: a writer that finishes it now either has renamed it, or fails.
    gone = path.with_name(f".{path.name[:64]}.gone.fastema-{secrets.token_hex(6)}.part")
    os.rename(path, gone)
    if gone.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink()


def fsync(path: str | os.PathLike[str]) -> None:
    """Flush a file's written data to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: str | os.PathLike[str]) -> File:
    """Read the header of a safetensors file; raise a CheckpointError if the file is damaged."""
    return parse(OpenFile(Path(path)))


def parse(file: OpenFile) -> File:
    """Read the header of an open safetensors file; see :func:`read`."""
    name, size = file.path, file.size
    head = bytearray(8)
    file.read(0, memoryview(head)[: min(8, size)])
    length = int.from_bytes(head, "little")
    if size < 8 or not 2 <= length <= min(size - 8, LONGEST):
        raise CheckpointError(f"{name} is not a safetensors or torch.save file, or was cut short")
    text = bytearray(length)
    file.read(8, memoryview(text))
    try:
        header = _check_type(json.loads(bytes(text)), dict)
        annotations = header.pop(_METADATA, None)
        metadata = {} if annotations is None else _check_type(annotations, dict)
        for value in metadata.values():
            _check_type(value, str)
        tensors = {key: _parse_tensor(entry, 8 + length, size) for key, entry in header.items()}
        end = 8 + length
        for one in sorted(tensors.values(), key=lambda one: (one.offset, one.nbytes)):
            if one.offset != end:
                raise ValueError("its tensors overlap or have gaps between them")
            end += one.nbytes
        if end != size:
            raise ValueError(f"{size - end} bytes at its end belong to no tensor")
    except (ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{name} is not a safetensors file: {error}") from None
    return File(file, tensors, metadata)


def _check_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected a {kind.__name__}, got {str(value)[:100]!r}")
    return value


def check_extents(found: Any) -> tuple[int, ...]:
    """Return a shape, offsets or strides; raise a ValueError for what no tensor of NumPy has."""
    extents = tuple(found)
    if not all(type(one) is int and 0 <= one <= _MOST for one in extents):
        raise ValueError(f"{str(found)[:100]} are not numbers from 0 to {_MOST}")
    if len(extents) > _MOST_AXES:
        raise ValueError(f"{len(extents)} are too many axes")
    return extents


def check_shape(found: Any) -> tuple[int, ...]:
    """Return a shape; raise a ValueError if no array has it."""
    shape = check_extents(found)
    if math.prod(filter(None, shape)) > _MOST:
        raise ValueError(f"the shape {list(shape)} has too many elements")
    return shape


def _parse_tensor(entry: Any, start: int, size: int) -> StoredTensor:
    entry = _check_type(entry, dict)
    shape = check_shape(_check_type(entry["shape"], list))
    offsets = check_extents(_check_type(entry["data_offsets"], list))
    first, end = (start + offset for offset in offsets)
    found = StoredTensor(dtype(_CODES[_check_type(entry["dtype"], str)]), shape, first)
    if not start <= first <= end <= size or end - first != found.nbytes:
        raise ValueError("a tensor lies outside the file; it was cut short")
    return found
