"""Write safetensors files atomically, and read them in parts.

The format is eight bytes with the length of a JSON header, the header, and the tensors' bytes in
row-major order; see https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple

from fastema.errors import CheckpointError, StorageError
from fastema.layout.dtypes import DType, dtype
from fastema.layout.flat import row_major
from fastema.layout.spec import TensorSpec

__all__ = [
    "File",
    "FileChangedError",
    "Fill",
    "StoredTensor",
    "atomic_write_path",
    "fsync",
    "header_of",
    "lock_folder",
    "read",
    "read_whole",
    "reading",
    "refuse_ending",
    "wrap_write_errors",
    "write",
]

Fill = Callable[[int, memoryview], None]
"""``fill(offset, buffer)``: fill the buffer with the file's bytes from an offset on."""

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

_LONGEST_HEADER: Final = 100_000_000

_METADATA: Final = "__metadata__"
"""Key of the metadata in a safetensors header."""

_MOST: Final = 2**63 - 1
"""The largest extent or offset."""

_MOST_AXES: Final = 32
"""Limit on the axes of a tensor, as in NumPy 1."""

_PARTIAL: Final = re.compile(r"\..+\.fastema-[0-9a-f]{12}\..+", re.DOTALL)
"""Names of partial files and folders: being written, or left behind by a killed process."""

_AHEAD: Final = 8
"""Readahead, in multiples of the bytes just read."""

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


class FileChangedError(CheckpointError):
    """Raised when a file is replaced or changed between two reads."""


class File(NamedTuple):
    """A safetensors file whose header has been read."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    version: tuple[int, ...] | None = None  # changes if the file is replaced or rewritten

    def opened(self) -> AbstractContextManager[Fill]:
        """Open the file for :func:`reading`; raise a FileChangedError if it has changed."""
        return reading(self.path, self.version)


def _version_of(opened: Any) -> tuple[int, ...]:
    found = os.fstat(opened.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def reading(path: Path, version: tuple[int, ...] | None = None) -> Iterator[Fill]:
    """Yield a function that reads a file's bytes from an offset into a buffer, on any thread.

    Raise a CheckpointError if the file is missing, is not a regular file, or is truncated while it
    is read, and a FileChangedError if its version is not ``version``.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise CheckpointError(f"{path} is not a file")
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    with file as opened:
        if version is not None and _version_of(opened) != version:
            raise FileChangedError(f"{path} was changed while it was read; read it again")

        def fill(offset: int, buffer: memoryview) -> None:
            ahead = len(buffer)
            while buffer:
                count = _read_at(opened, offset, buffer)
                if not count:
                    raise CheckpointError(f"{path} was cut short")
                offset, buffer = offset + count, buffer[count:]
            if hasattr(os, "posix_fadvise"):  # the disk reads while the caller computes
                os.posix_fadvise(opened.fileno(), offset, _AHEAD * ahead, os.POSIX_FADV_WILLNEED)

        yield fill


def read_whole(path: Path, most: int) -> bytes:
    """Read a small file; raise a CheckpointError if it is larger than ``most`` bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a file")
        with path.open("rb") as opened:
            content = opened.read(most + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if len(content) > most:
        raise CheckpointError(f"{path} has more than {most} bytes, the limit for such a file")
    return content


def _read_at(opened: Any, offset: int, buffer: memoryview) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(opened.fileno(), [buffer], offset)
    with _seeking:
        opened.seek(offset)
        return int(opened.readinto(buffer))


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

    Also remove what killed writers left in the folder, unless another process is writing there or
    the file system has no locks to rule that out. Raise a StorageError if the file cannot be
    written.
    """
    final = Path(path)
    if not final.name or "\0" in final.name:
        raise StorageError(f"{os.fspath(path)!r} is not a file name")
    if final.exists() and not final.is_file():
        raise StorageError(f"{final} is not a file, and will not be replaced by one")
    # Not from tempfile, whose files do not have the default permissions.
    partial = final.with_name(f".{final.name}.fastema-{secrets.token_hex(6)}{suffix}")
    with wrap_write_errors(final), lock_folder(final.parent):
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


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a shared lock on a folder during the block, after removing files of killed writers.

    All writers share the lock, and the system releases the locks of killed processes. A process
    that gets the lock exclusively therefore knows that nobody else is writing.
    """
    with ExitStack() as stack:
        with suppress(ImportError, OSError):  # Windows, or a network file system
            locks = import_module("fcntl")
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            with suppress(OSError):
                locks.flock(handle, locks.LOCK_EX | locks.LOCK_NB)
                _remove_partial(folder)
            with suppress(OSError):  # do not wait for another program's lock
                locks.flock(handle, locks.LOCK_SH | locks.LOCK_NB)
        yield


def _remove_partial(folder: Path) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _PARTIAL.fullmatch(entry.name) or entry.is_symlink():
                continue
            if entry.is_dir():
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.is_file():
                os.unlink(entry.path)


def fsync(path: str | os.PathLike[str]) -> None:
    """Flush a file's written data to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: str | os.PathLike[str]) -> File:
    """Read the header of a safetensors file; raise a CheckpointError if the file is damaged."""
    name = Path(path)
    if not stat.S_ISREG(name.stat().st_mode):  # opening a pipe would block until it has a writer
        raise CheckpointError(f"{name} is not a file")
    with name.open("rb") as opened:
        version = _version_of(opened)
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(
                f"{name} is not a safetensors or torch.save file, or was cut short"
            )
        text = opened.read(length)
    try:
        header = _check_type(json.loads(text, object_pairs_hook=_without_repeats), dict)
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
    return File(name, tensors, metadata, version)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _check_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected a {kind.__name__}, got {str(value)[:100]!r}")
    return value


def _whole_number(value: Any) -> int:
    number: int = _check_type(value, int)
    if not 0 <= number <= _MOST:
        raise ValueError(f"expected a number from 0 to {_MOST}, got {number}")
    return number


def _parse_tensor(entry: Any, start: int, size: int) -> StoredTensor:
    entry = _check_type(entry, dict)
    shape = tuple(_whole_number(extent) for extent in _check_type(entry["shape"], list))
    if len(shape) > _MOST_AXES or math.prod(filter(None, shape)) > _MOST:
        raise ValueError(f"the shape {list(shape)} has too many axes or elements")
    first, end = (
        start + _whole_number(offset) for offset in _check_type(entry["data_offsets"], list)
    )
    found = StoredTensor(dtype(_CODES[_check_type(entry["dtype"], str)]), shape, first)
    if not start <= first <= end <= size or end - first != found.nbytes:
        raise ValueError("a tensor lies outside the file; it was cut short")
    return found
