"""Finished checkpoints in any layout: tensors by name, read in parts without running code."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from fastema.checkpoint import dcp, files, torch_file
from fastema.checkpoint.files import OpenFile, Read, StoredTensor, retrying
from fastema.checkpoint.stretches import Contiguous, Place
from fastema.errors import CheckpointError

__all__ = [
    "PROVENANCE",
    "Checkpoint",
    "Read",
    "drop_tied_names",
    "open_checkpoint",
    "open_torch_file",
    "step_of_name",
]

PROVENANCE: Final = "fastema.average"
"""Metadata key of an average's sources and their weights."""

_INDEX: Final = ".index.json"
_STATES: Final = ("state_dict", "model_state_dict", "model", "module", "ema_state_dict", "ema")
"""Keys under which training programs save a model's state; the first one present is used."""

_MODELS: Final = (
    *("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors"),
    *("pytorch_model.bin", "adapter_model.bin"),
)
"""File names of the model in a folder that may hold other files with the same extensions."""

_COUNTERS: Final = ("global_step", "step", "iteration", "num_steps")


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint.

    Attributes
    ----------
    path : Path
        The file or folder of the checkpoint.
    format : str
        "safetensors", "sharded safetensors", "torch", "sharded torch" or "torch.distributed".
    tensors : dict of str to StoredTensor
        Dtype and shape of each tensor by name.
    places : mapping of str to Place
        Where the bytes of each tensor lie, in files that stay open: a checkpoint is read as it was
        when it was opened, even if another takes its path.
    metadata : dict of str to str
        Metadata of safetensors files; otherwise empty.
    step : int or None
        The training step in the metadata or the name.
    tied : dict of str to str
        Name of a tied tensor to the name under which it is in ``tensors``.
    layout : dict of str to list of str
        Output file to its tensors in order. A format that is not written has one output file.
    files : list of Path
        All files of the checkpoint.
    """

    path: Path
    format: str
    tensors: dict[str, StoredTensor]
    places: Mapping[str, Place] = field(repr=False)
    layout: dict[str, list[str]] = field(repr=False)
    files: list[Path] = field(repr=False)
    metadata: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    step: int | None = None

    def only(self, names: Container[str]) -> Checkpoint:
        """Return the checkpoint without the tensors of other names."""
        kept = {name: one for name, one in self.tensors.items() if name in names}
        layout = {
            file: [name for name in held if name in kept] for file, held in self.layout.items()
        }
        return replace(self, tensors=kept, layout=layout)

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """Yield a function that reads a tensor's bytes, on any thread.

        Raises
        ------
        FileChangedError
            At the beginning or the end of the block, if a file was rewritten in place.
        """
        every = dict.fromkeys(file for place in self.places.values() for file in place.files)
        for file in every:
            file.refuse_changes()
        yield lambda name, first, buffer: self.places[name].read(first, buffer)
        for file in every:
            file.refuse_changes()


def open_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Open a checkpoint in any supported layout and list its tensors without reading them.

    Parameters
    ----------
    path : path
        A safetensors file, or a folder or an index of several; a file of ``torch.save``, or a
        folder of several; a Hugging Face folder; a folder of torch.distributed.checkpoint.
    key : str, optional
        Dotted key of the weights in the checkpoint, such as ``"trainer.ema"``. By default the first
        of ``state_dict``, ``model_state_dict``, ``model``, ``module``, ``ema_state_dict`` and
        ``ema`` that holds tensors, or else the whole checkpoint.

    Raises
    ------
    CheckpointError
        If the checkpoint is in another layout, is damaged, or contains anything but tensors and
        plain values, since loading that would run code.

    Notes
    -----
    No code in a checkpoint is run. Only its headers and descriptions are read.
    """
    found = Path(path)
    with _wrap_read_errors(found):
        mode = found.stat().st_mode
        if stat.S_ISDIR(mode):
            made = retrying(lambda: _open_folder(found, key))
        elif not stat.S_ISREG(mode):  # opening a pipe would block until it has a writer
            raise CheckpointError(f"{found} is not a file or a folder")
        else:
            made = retrying(lambda: _open_file(found, key))
    if not made.tensors:
        raise CheckpointError(f"{found} holds no tensors")
    return made


@contextmanager
def _wrap_read_errors(path: Path) -> Iterator[None]:
    """Turn an OSError or ValueError in the block into a CheckpointError that names the path."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # a null character in the path
        raise CheckpointError(f"cannot read {str(path)!r}: {error}") from None


def open_torch_file(path: Path) -> OpenFile | None:
    """Open a regular file that begins like one of ``torch.save``; return None for any other."""
    with _wrap_read_errors(path):
        file = OpenFile(path) if path.is_file() else None
        return file if file is not None and file.starts_with(torch_file.MAGIC) else None


def _open_file(path: Path, key: str | None) -> Checkpoint:
    if path.name.endswith(_INDEX):
        return _open_index(path, key)
    return _open_parts([OpenFile(path)], path, key)


def _open_parts(opened: list[OpenFile], path: Path, key: str | None) -> Checkpoint:
    if opened and opened[0].starts_with(torch_file.MAGIC):
        return _open_torch(opened, path, key)
    if key is not None:
        raise CheckpointError(f"{path} has nothing at {key!r}: it holds tensors by name alone")
    return _open_safetensors(opened, path)


def _open_folder(path: Path, key: str | None) -> Checkpoint:
    if (path / ".metadata").exists():
        return _open_dcp(path, key)
    for name in _MODELS:
        for file in (path / f"{name}{_INDEX}", path / name):
            if file.exists():
                return _with_folder_path(_open_file(file, key), path)
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth"):
        indices = sorted(path.glob(f"{pattern}{_INDEX}"))
        one = sorted(path.glob(pattern))
        found = indices or one
        if len(found) == 1:
            return _with_folder_path(_open_file(found[0], key), path)
        if found:
            raise CheckpointError(
                f"{path} holds {len(found)} files that may be the checkpoint, such as "
                f"{found[0].name} and {found[1].name}; name one of them"
            )
    raise CheckpointError(
        f"{path} holds no checkpoint: no .safetensors, .bin, .pt or .pth file, and no .metadata of "
        "torch.distributed.checkpoint"
    )


def _with_folder_path(found: Checkpoint, path: Path) -> Checkpoint:
    """Return the checkpoint with its folder's path, and the step in that name if unknown so far."""
    step = found.step if found.step is not None else step_of_name(path)
    return replace(found, path=path, step=step)


def _open_index(path: Path, key: str | None) -> Checkpoint:
    listing = OpenFile(path)
    content = listing.read_whole()
    try:
        index = json.loads(content)
        names = index["weight_map"]
        if not isinstance(names, dict) or not all(isinstance(one, str) for one in names.values()):
            raise ValueError("its weight_map does not map names to files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint index: {error}") from None
    listed = dict.fromkeys(names.values())
    for name in listed:
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{path}: {name!r} is not the name of a file next to it")
    for name in listed:
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path} names {name}, which is missing")
    parts = [OpenFile(path.parent / name) for name in listed]
    for one in (listing, *parts):  # all of the same moment
        one.refuse_changes(path=True)
    found = _open_parts(parts, path, key)
    missing = [
        name
        for name, part in names.items()
        if (name not in found.tensors and name not in found.tied)
        or (name in found.places and found.places[name].files[0].path.name != part)
    ]
    if missing:
        raise CheckpointError(f"{path}: {missing[0]!r} is not in the file that it names")
    lost = [name for name in names if name in found.tied and found.tied[name] not in names]
    if lost:
        raise CheckpointError(
            f"{path}: {lost[0]!r} is tied to {found.tied[lost[0]]!r}, which the index leaves out"
        )
    return replace(found.only(names), files=[*found.files, path])


def _open_safetensors(opened: list[OpenFile], path: Path) -> Checkpoint:
    tensors: dict[str, StoredTensor] = {}
    places: dict[str, Place] = {}
    layout: dict[str, list[str]] = {}
    metadata: dict[str, str] = {}
    for file in opened:
        part, found = file.path, files.parse(file)
        inside = sorted(found.tensors, key=lambda name: (found.tensors[name].offset, name))
        for name in inside:
            if name in tensors:
                raise CheckpointError(f"{part}: {name!r} is in another file too")
            tensors[name] = found.tensors[name]
            places[name] = Contiguous(file, found.tensors[name].offset)
        layout[part.name] = inside
        metadata |= found.metadata
    paths = [file.path for file in opened]
    kind = "safetensors" if len(paths) == 1 else "sharded safetensors"
    step = _step_of(metadata)
    step = step_of_name(path) if step is None else step
    return Checkpoint(path, kind, tensors, places, layout, paths, metadata, {}, step)


def _open_torch(opened: list[OpenFile], path: Path, key: str | None) -> Checkpoint:
    tensors: dict[str, StoredTensor] = {}
    places: dict[str, Place] = {}
    step: int | None = None
    for file in opened:
        part, state = file.path, torch_file.read(file)
        chosen, prefix = _select_part(state, key, part)
        step = _step_of(state) if step is None else step
        for name, one in torch_file.tensors_in(chosen).items():
            if name in tensors:
                raise CheckpointError(f"{part}: {name!r} is in another file too")
            tensors[name], places[name] = torch_file.locate_tensor(f"{prefix}{name}", one, state)
    paths = [file.path for file in opened]
    kind = "torch" if len(paths) == 1 else "sharded torch"
    step = step_of_name(path) if step is None else step
    layout = {"model.safetensors": list(tensors)}
    return drop_tied_names(Checkpoint(path, kind, tensors, places, layout, paths, {}, {}, step))


def drop_tied_names(found: Checkpoint) -> Checkpoint:
    """Keep only the first name of tied tensors; ``tied`` of the result maps the others to it."""
    owners: dict[Any, str] = {}
    tied = dict(found.tied)
    for name, stored in found.tensors.items():
        if stored.nbytes:
            key = found.places[name].origin, stored.kind, stored.shape
            owner = owners.setdefault(key, name)
            if owner != name:
                tied[name] = owner
    return replace(found.only(found.tensors.keys() - tied), tied=tied)


def _open_dcp(path: Path, key: str | None) -> Checkpoint:
    folder = dcp.opened(path)
    places = {name: tuple(map(str, folder.places.get(name, (name,)))) for name in folder.tensors}
    wanted = [tuple(key.split("."))] if key is not None else [*((one,) for one in _STATES), ()]
    for prefix in wanted:  # a flat key such as "model.weight" does not match the prefix "model"
        depth = len(prefix)
        chosen = {
            ".".join(place[depth:]): name
            for name, place in places.items()
            if place[:depth] == prefix and len(place) > depth
        }
        if chosen:
            break
    else:
        raise CheckpointError(f"{path} has nothing at {key!r}")
    tensors = {name: folder.tensors[one].tensor for name, one in chosen.items()}
    lie = {name: dcp.stretches_of(name, folder.tensors[one]) for name, one in chosen.items()}
    used = dict.fromkeys(file.path for place in lie.values() for file in place.files)
    layout = {"model.safetensors": list(tensors)}
    every = [*used, path / ".metadata"]
    step = step_of_name(path)
    return Checkpoint(path, "torch.distributed", tensors, lie, layout, every, {}, {}, step)


def _select_part(state: torch_file.TorchFile, key: str | None, path: Path) -> tuple[Any, str]:
    """Return the part of a file that holds the weights, and its key with a trailing dot."""
    if key is not None:
        return torch_file.part_of(state.content, key, path), f"{key}."
    for one in _STATES:
        inner = state.content.get(one) if isinstance(state.content, dict) else None
        if isinstance(inner, dict) and torch_file.tensors_in(inner):
            return inner, f"{one}."
    return state.content, ""


def _step_of(values: Any) -> int | None:
    """Return the step in a checkpoint's metadata or top-level entries, or None."""
    plain = values.content if isinstance(values, torch_file.TorchFile) else values
    for name in _COUNTERS if isinstance(plain, dict) else ():
        value = plain.get(name)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
            return int(value)
        if type(value) is int and 0 <= value < 2**62:
            return value
    return None


def step_of_name(path: Path) -> int | None:
    """Return the last number in a name, as in ``checkpoint-500`` or ``step_000500.bin``."""
    name = path.name.removesuffix(_INDEX)
    numbers = re.findall(r"(?<![.\d])\d{1,18}(?!\d)", Path(name).stem if path.suffix else name)
    return int(numbers[-1]) if numbers else None
