"""Write Hugging Face folders: safetensors files, an index, and copied configuration."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from fastema.bridges.memory import bytes_of
from fastema.checkpoint.files import (
    StoredTensor,
    fsync,
    header_of,
    partial_path,
    remove_abandoned,
    wrap_write_errors,
)
from fastema.errors import CheckpointError, StorageError
from fastema.layout.flat import row_major

__all__ = [
    "Block",
    "Files",
    "Write",
    "begin",
    "check_vacant",
    "create",
    "files_of",
    "new_folder",
    "plan",
    "publish_folder",
    "write_blocks",
    "writing",
]

Write = Callable[[str, int, memoryview], None]
"""``write(name, first, data)``: write bytes of a tensor, from ``first`` on."""

_WEIGHTS: Final = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"),
    *(".distcp", ".metadata"),
}
"""Extensions of files that hold weights or list which file holds them."""


class Block(NamedTuple):
    """A block of a tensor that this process writes."""

    name: str
    offset: tuple[int, ...]  # of its first element in the tensor
    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], Any]  # returns a piece, row-major in host memory


class Files(NamedTuple):
    """The files of a folder that is being written."""

    sizes: dict[str, int]  # file to its size in bytes
    places: dict[str, tuple[str, int]]  # tensor to its file and first byte in it
    headers: dict[str, bytes]
    index_name: str = "model.safetensors.index.json"


def plan(
    tensors: Mapping[str, StoredTensor], file_bytes: int, metadata: Mapping[str, str]
) -> Files:
    """Assign tensors in order to files of up to ``file_bytes``, with at least one tensor each."""
    groups: list[list[str]] = [[]]
    room = file_bytes
    for name, tensor in tensors.items():
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = file_bytes
        groups[-1].append(name)
        room -= tensor.nbytes
    many = len(groups)
    names_of = {
        "model.safetensors" if many == 1 else f"model-{i:05d}-of-{many:05d}.safetensors": names
        for i, names in enumerate(groups, 1)
    }
    return files_of(names_of, tensors, metadata)


def files_of(
    layout: Mapping[str, Sequence[str]],
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
) -> Files:
    """Place tensors in files as ``layout`` says, which maps each file to its tensors."""
    files = Files({}, {}, {})
    for file, names in layout.items():
        header = header_of({name: tensors[name] for name in names}, metadata)
        offset = len(header)
        for name in names:
            files.places[name] = file, offset
            offset += tensors[name].nbytes
        files.headers[file], files.sizes[file] = header, offset
    return files


def check_vacant(folder: Path) -> None:
    """Raise a CheckpointError if the folder is not empty, or if the path is not a folder."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is not a folder; name one that does not exist yet")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; name a folder that does not exist yet")


def begin(folder: Path, files: Files) -> Path:
    """Create and return a hidden folder beside ``folder``, with files of their final size."""
    remove_abandoned(folder.parent)
    partial = partial_path(folder)
    with wrap_write_errors(folder):
        partial.mkdir()
        try:
            create(partial, files)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return partial


def create(folder: Path, files: Files) -> None:
    """Create files of their final size in a folder, with their headers."""
    for file, size in files.sizes.items():
        with (folder / file).open("xb") as opened:
            opened.write(files.headers[file])
            opened.truncate(size)


@contextmanager
def writing(folder: Path, files: Files) -> Iterator[Write]:
    """Yield a function that writes parts of tensors into the files of a folder, on any thread."""
    with wrap_write_errors(folder), ExitStack() as stack:
        handles: dict[str, int] = {}
        for file in files.sizes:
            handles[file] = os.open(folder / file, os.O_WRONLY)
            stack.callback(os.close, handles[file])

        def write(name: str, first: int, data: memoryview) -> None:
            file, begin_of = files.places[name]
            _write_at(handles[file], data, begin_of + first)

        yield write
        for handle in handles.values():
            os.fsync(handle)


@contextmanager
def new_folder(folder: Path, files: Files, copied_from: Path) -> Iterator[Path]:
    """Yield a hidden folder to write to; rename it to ``folder`` on success, else remove it."""
    with wrap_write_errors(folder):
        partial = begin(folder, files)
        try:
            yield partial
            publish_folder(partial, folder, files, copied_from)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_blocks(
    folder: Path,
    files: Files,
    tensors: Mapping[str, StoredTensor],
    blocks: Iterable[Block],
    most: int,
) -> None:
    """Write this process's blocks into the files, in pieces of at most ``most`` bytes."""
    with writing(folder, files) as write:
        for block in blocks:
            tensor = tensors[block.name]
            for piece in pieces(block.shape, tensor.kind.itemsize, most):
                array = block.read(piece)
                data = bytes_of(array)  # lives no longer than the array
                for at, first, count in _runs(block, piece, tensor):
                    write(block.name, at, data[first : first + count])


def pieces(shape: tuple[int, ...], itemsize: int, most: int) -> Iterator[tuple[slice, ...]]:
    """Yield the pieces of a block in row-major order, each of at most ``most`` bytes."""
    if not math.prod(shape):
        return
    if math.prod(shape) * itemsize <= most or not shape:
        yield tuple(slice(0, extent) for extent in shape)
        return
    row = math.prod(shape[1:]) * itemsize
    if row > most:
        for i in range(shape[0]):
            for rest in pieces(shape[1:], itemsize, most):
                yield (slice(i, i + 1), *rest)
        return
    rows = max(most // row, 1)
    for i in range(0, shape[0], rows):
        yield slice(i, min(i + rows, shape[0])), *(slice(0, extent) for extent in shape[1:])


def _runs(
    block: Block, piece: tuple[slice, ...], tensor: StoredTensor
) -> Iterator[tuple[int, int, int]]:
    """Yield the contiguous runs of a piece: byte in the tensor, byte in the piece, and length."""
    size = tensor.kind.itemsize
    extents = [one.stop - one.start for one in piece]
    starts = [o + one.start for o, one in zip(block.offset, piece, strict=True)]
    axis = len(extents)
    while axis and extents[axis - 1] == tensor.shape[axis - 1]:
        axis -= 1
    # A run takes all axes that the piece covers completely, and a range of the axis before them.
    axis = max(axis - 1, 0)
    strides = row_major(tensor.shape)
    count = math.prod(extents[axis:]) * size
    outer = extents[:axis]
    first = sum(s * stride for s, stride in zip(starts, strides, strict=True))
    for number in range(math.prod(outer)):
        rest, at = number, first
        for extent, stride in zip(reversed(outer), reversed(strides[:axis]), strict=True):
            rest, i = divmod(rest, extent)
            at += i * stride
        yield at * size, number * count, count


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all bytes to an open file at an offset."""
    while data:
        count = os.pwrite(handle, data, offset)
        if not count:
            raise StorageError("the disk is full")
        data, offset = data[count:], offset + count


def publish_folder(partial: Path, folder: Path, files: Files, copied_from: Path | None) -> None:
    """Write the index, copy the files that are not weights, and rename the folder into place."""
    with wrap_write_errors(folder):
        if len(files.sizes) > 1:
            total = sum(files.sizes.values()) - sum(map(len, files.headers.values()))
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: file for name, (file, _) in files.places.items()},
            }
            (partial / files.index_name).write_text(json.dumps(index, indent=2), encoding="utf-8")
            fsync(partial / files.index_name)
        for path in sorted(copied_from.iterdir()) if copied_from is not None else ():
            ending = path.suffix or path.name
            weights = ending in _WEIGHTS or path.name.endswith(".index.json")
            if path.is_file() and not weights and path.name not in files.sizes:
                shutil.copyfile(path, partial / path.name)
                fsync(partial / path.name)
        fsync(partial)
        os.replace(partial, folder)
        with suppress(OSError):  # not every system can synchronize a folder
            fsync(folder.parent)
