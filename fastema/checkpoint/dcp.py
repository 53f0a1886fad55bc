"""Read torch.distributed.checkpoint folders without running any code in them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.average.state import HEADER, part_of_key, select_average
from fastema.checkpoint import pickles, torch_file
from fastema.checkpoint.files import OpenFile, StoredTensor, check_extents, check_shape, retrying
from fastema.checkpoint.folder import Block
from fastema.checkpoint.stretches import Stretches
from fastema.errors import CheckpointError
from fastema.layout.dtypes import NAME_OF, dtype
from fastema.layout.flat import row_major

__all__ = [
    "ChunkedTensor",
    "Folder",
    "average_in",
    "blocks_of",
    "check",
    "opened",
    "plain_values",
    "state_in",
    "stretches_of",
]

_CODE_OF: Final = {name: code for code, name in NAME_OF.items()}

_LONGEST_VALUE: Final = 1 << 24
"""Size limit of a plain value, in bytes; longer ones are not read."""


class _Record:
    """Stand-in for an unpickled object; it holds the object's attributes or its state."""

    state: Any = ()

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


_METADATA: Final = "torch.distributed.checkpoint.metadata"
_ALLOWED: Final[dict[tuple[str, str], Any]] = {
    **{
        (_METADATA, name): _Record
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta"),
            *("ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "_MEM_FORMAT_ENCODING"),
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("torch", "Size"): pickles.TENSORS["torch", "Size"],
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib", "Path"): _Record,
    ("pathlib._local", "PosixPath"): _Record,
    **{("torch", name): name for name in _CODE_OF},
}


class _Chunk(NamedTuple):
    """A block of a tensor, and the byte range of a file that holds it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: OpenFile
    begin: int
    length: int


class ChunkedTensor(NamedTuple):
    """A tensor in a folder, and its blocks."""

    tensor: StoredTensor
    chunks: list[_Chunk]


class Folder(NamedTuple):
    """The contents of a folder."""

    path: Path
    tensors: dict[str, ChunkedTensor]  # by key
    places: dict[str, tuple[Any, ...]]  # key to its path in the saved state
    values: dict[str, tuple[OpenFile, int, int]]  # key to file, offset and length


def opened(path: Path) -> Folder:
    """Read the description of a folder; raise a CheckpointError if it is missing or damaged."""
    return retrying(lambda: _open(path))


def _open(path: Path) -> Folder:
    if not (path / ".metadata").exists():
        raise CheckpointError(
            f"{path} has no .metadata: it is not a folder of torch.distributed.checkpoint, or its "
            "writers were killed"
        )
    description = OpenFile(path / ".metadata")
    files: dict[Path, OpenFile] = {}
    try:
        found = pickles.load(description.read_whole(), _ALLOWED)
        folder = _parse_description(path, found, files)
    except CheckpointError:
        raise
    except Exception as error:  # pickle, and objects of other kinds, raise many types
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{description.path} cannot be read: {why}") from None
    for one in (description, *files.values()):  # all of the same moment
        one.refuse_changes(path=True)
    return folder


def _parse_description(path: Path, found: Any, files: dict[Path, OpenFile]) -> Folder:
    """Return the contents of a folder; its files are opened and added to ``files``."""

    def opened(key: str, info: Any) -> OpenFile:
        file = _file_of(path, key, info)
        if file not in files:
            files[file] = OpenFile(file)
        return files[file]

    stored: dict[Any, Any] = {}
    tensors: dict[str, ChunkedTensor] = {}
    values: dict[str, tuple[OpenFile, int, int]] = {}
    for index, info in found.storage_data.items():
        if getattr(index, "offset", None) is not None:
            stored[index.fqn, tuple(index.offset)] = info
        else:
            file = opened(index.fqn, info)
            values[str(index.fqn)] = file, int(info.offset), int(info.length)
    for key, entry in found.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            continue
        state = entry.properties.state or (getattr(entry.properties, "dtype", None),)
        if state[0] not in _CODE_OF:
            raise CheckpointError(f"{key}: its dtype is unknown")
        shape = check_shape(entry.size)
        chunks = []
        for one in entry.chunks:
            offset, extents = check_extents(one.offsets), check_extents(one.sizes)
            ends = [o + n for o, n in zip(offset, extents, strict=True)]
            if len(ends) != len(shape) or any(e > n for e, n in zip(ends, shape, strict=True)):
                raise CheckpointError(f"{key}: a block lies outside the tensor")
            info = stored[key, offset]
            file = opened(key, info)
            chunks.append(_Chunk(offset, extents, file, int(info.offset), int(info.length)))
        tensor = StoredTensor(dtype(_CODE_OF[state[0]]), shape)
        if sum(math.prod(one.shape) for one in chunks) != tensor.size or _has_overlap(chunks):
            raise CheckpointError(f"{key}: its blocks overlap or do not cover it")
        tensors[key] = ChunkedTensor(tensor, chunks)
    places = {str(key): tuple(place) for key, place in (found.planner_data or {}).items()}
    return Folder(path, tensors, places, values)


def _file_of(folder: Path, key: str, info: Any) -> Path:
    """Return the file that holds an entry; raise a CheckpointError if it is not in the folder."""
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(f"{key}: its bytes are compressed; load it with torch")
    name = str(info.relative_path)
    if Path(name).name != name or "\0" in name:
        raise CheckpointError(f"{key}: {name!r} is not a file in the folder")
    return folder / name


def plain_values(folder: Folder) -> dict[str, Any]:
    """Return the numbers, strings and other plain values of a folder by key.

    Values that only code could rebuild are left out, and so are those of optimizers' groups, which
    no average needs.
    """
    found = {}
    for key, (file, begin, length) in folder.values.items():
        if length > _LONGEST_VALUE or "param_groups" in folder.places.get(key, (key,)):
            continue
        try:
            found[key] = torch_file.read(file, begin, length).content
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):
                raise
    return found


def check(path: Path) -> None:
    """Read a whole folder and verify its checksums; raise a CheckpointError if one differs."""
    folder = opened(path)
    chunks = [one for stored in folder.tensors.values() for one in stored.chunks]
    places = {(one.file, one.begin, one.length) for one in chunks} | {*folder.values.values()}
    for file, begin, length in sorted(places, key=lambda one: (one[0].path, *one[1:])):
        torch_file.check(file, begin, length)


def _has_overlap(chunks: list[_Chunk]) -> bool:
    """Return whether any two blocks share an element."""
    filled = [one for one in chunks if math.prod(one.shape)]
    if len(filled) < 2 or not filled[0].shape:
        return len(filled) > 1
    first = np.array([one.offset for one in filled], np.int64)
    end = first + np.array([one.shape for one in filled], np.int64)
    # Sort along the axis with the most cuts: there each block overlaps few others.
    axis = int(np.argmax([len(np.unique(first[:, k])) for k in range(first.shape[1])]))
    order = np.argsort(first[:, axis], kind="stable")
    first, end = first[order], end[order]
    last = np.searchsorted(first[:, axis], end[:, axis], "left")
    return any(
        bool(((first[i] < end[i + 1 : n]) & (first[i + 1 : n] < end[i])).all(1).any())
        for i, n in enumerate(last)
    )


def average_in(folder: Folder, key: str | None, which: int | None) -> dict[str, str]:
    """Return name to key for the only average that matches; None matches any value."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    places = {flat: folder.places.get(flat, (flat,)) for flat in folder.tensors}
    states = {place[:-1] for place in places.values() if place[-1] == HEADER}
    for flat, (*parents, last) in places.items():
        part, index, name = part_of_key(last) or ("", 0, "")
        if part == "shadow" and tuple(parents) in states:  # else a model's
            state = found.setdefault(".".join(map(str, parents)), {})
            state.setdefault(index, {})[name] = flat
    held = [(prefix, index) for prefix, averages in found.items() for index in averages]
    chosen = [
        one for one in held if (key is None or one[0] == key) and (which is None or one[1] == which)
    ]
    if len(chosen) != 1:
        there = ", ".join(f"key={k!r}, which={w}" for k, w in sorted(held)) or "none"
        raise CheckpointError(
            f"{folder.path} holds {len(chosen)} averages that match key={key!r} and "
            f"which={which!r}; it has: {there}"
        )
    prefix, index = chosen[0]
    return select_average(found[prefix], index)


def state_in(folder: Folder, key: str) -> dict[str, str]:
    """Return name to key for the tensors of the model state at ``key``."""
    found = {}
    for flat in folder.tensors:
        place = ".".join(map(str, folder.places.get(flat, (flat,))))
        if place.startswith(f"{key}."):
            found[place.removeprefix(f"{key}.")] = flat
    if not found:
        raise CheckpointError(f"{folder.path} has nothing at {key!r}")
    return found


def blocks_of(name: str, stored: ChunkedTensor) -> Iterator[Block]:
    """Yield the blocks of a tensor; each is read only when it is written."""
    for chunk in stored.chunks:
        if math.prod(chunk.shape):
            yield Block(name, chunk.offset, chunk.shape, _BlockReader(name, stored.tensor, chunk))


class _BlockReader:
    """Callable that reads a row-major piece of a block."""

    def __init__(self, name: str, tensor: StoredTensor, chunk: _Chunk) -> None:
        self._name, self._tensor, self._chunk = name, tensor, chunk
        self._strides = row_major(chunk.shape)
        self._begin: int | None = None

    def __call__(self, piece: tuple[slice, ...]) -> Any:
        size = self._tensor.kind.itemsize
        if self._begin is None:
            self._begin = _begin_of(self._name, self._tensor, self._chunk)
        extents = [one.stop - one.start for one in piece]
        at = sum(one.start * s for one, s in zip(piece, self._strides, strict=True)) * size
        data: NDArray[Any] = np.empty(math.prod(extents) * size, np.uint8)
        self._chunk.file.read(self._begin + at, memoryview(data.data))
        return data


def _begin_of(name: str, tensor: StoredTensor, chunk: _Chunk) -> int:
    """Return the offset in the file of the first element of a block that is not empty."""
    try:
        state = torch_file.read(chunk.file, chunk.begin, chunk.length)
    except CheckpointError as error:
        raise type(error)(f"{name}: {error}") from None
    found = state.content
    if not isinstance(found, pickles.PickledTensor):
        raise CheckpointError(f"{name}: the file holds no plain tensor")
    if (found.code, found.size) != (tensor.kind.code, chunk.shape):
        raise CheckpointError(
            f"{name}: the file has {found.code} of shape {list(found.size)}, expected "
            f"{tensor.kind.code}{list(chunk.shape)}"
        )
    if not pickles.is_row_major(found):
        raise CheckpointError(f"{name}: its block is not row-major; load it with torch")
    torch_file.locate_tensor(name, found, state)
    return state.storages[found.key][0] + found.offset * tensor.kind.itemsize


def stretches_of(name: str, stored: ChunkedTensor) -> Stretches:
    """Return where the bytes of a tensor lie in the files that hold its blocks."""
    chunks = [one for one in stored.chunks if math.prod(one.shape)]
    files = list(dict.fromkeys(one.file for one in chunks))

    def table() -> NDArray[np.int64]:
        parts = [_stretches(name, stored.tensor, one, files.index(one.file)) for one in chunks]
        whole = np.concatenate([np.empty((0, 3), np.int64), *parts])
        return np.asarray(whole[np.argsort(whole[:, 2], kind="stable")])

    return Stretches(files, table)


def _stretches(name: str, tensor: StoredTensor, chunk: _Chunk, place: int) -> NDArray[np.int64]:
    """Return the stretches of a block as rows of file, offset in the file, offset in the tensor.

    Trailing axes that the block covers completely are merged into one stretch.
    """
    size, axes = tensor.kind.itemsize, len(chunk.shape)
    while axes and chunk.shape[axes - 1] == tensor.shape[axes - 1]:
        axes -= 1
    outer, inner = chunk.shape[: max(axes - 1, 0)], chunk.shape[max(axes - 1, 0) :]
    strides = row_major(tensor.shape)
    first = sum(o * s for o, s in zip(chunk.offset, strides, strict=True))
    there = np.array(first, np.int64)
    for extent, stride in zip(outer, strides, strict=False):
        there = there[..., None] + np.arange(extent, dtype=np.int64) * stride
    begins = there.reshape(-1)
    begin = _begin_of(name, tensor, chunk)
    found = np.empty((len(begins), 3), np.int64)
    found[:, 0] = place
    found[:, 1] = begin + np.arange(len(begins), dtype=np.int64) * (math.prod(inner) * size)
    found[:, 2] = begins * size
    return found
