"""Checkpoint files as nested mappings whose tensors are located but not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from fastema.bridges.names import plain_names
from fastema.checkpoint import dcp, torch_file
from fastema.checkpoint.files import StoredTensor
from fastema.checkpoint.pickles import PickledTensor
from fastema.checkpoint.source import Checkpoint, open_checkpoint, open_torch_file
from fastema.checkpoint.stretches import Place
from fastema.errors import CheckpointError
from fastema.rules.checks import MAX_STEPS

__all__ = ["Content", "StoredLeaf", "collect_tensors", "open_content"]


@dataclass(frozen=True)
class StoredLeaf:
    """A tensor in a file, located but not read."""

    stored: StoredTensor
    place: Place


class Content(NamedTuple):
    """The nested mappings of a file; :meth:`find` locates a tensor in them without reading it."""

    path: Path
    mapping: Mapping[Any, Any]
    state: torch_file.TorchFile | None = None  # set for a file of torch.save
    format: str = "torch"  # of the checkpoints made from it, see Checkpoint

    def find(self, name: str, one: Any) -> StoredLeaf:
        """Locate a tensor; raise a CheckpointError if its dtype or memory layout is unsupported."""
        if isinstance(one, StoredLeaf):
            return one
        assert self.state is not None
        return StoredLeaf(*torch_file.locate_tensor(name, one, self.state))

    def tensors(self, part: Any) -> dict[str, Any]:
        """Return the tensors of a part of the file by dotted key."""
        return torch_file.tensors_in(part, StoredLeaf if self.state is None else PickledTensor)

    def checkpoint(self, tensors: Mapping[str, StoredLeaf]) -> Checkpoint:
        """Return a checkpoint that holds these tensors of the file under these names."""
        return Checkpoint(
            self.path,
            self.format,
            {name: one.stored for name, one in tensors.items()},
            {name: one.place for name, one in tensors.items()},
            {"model.safetensors": list(tensors)},
            list(dict.fromkeys(f.path for one in tensors.values() for f in one.place.files)),
        )

    def locate(self, tensors: Mapping[str, Any]) -> Checkpoint:
        """Return a checkpoint of tensors of the file under the names that they have here."""
        return self.checkpoint({name: self.find(name, one) for name, one in tensors.items()})

    def read(self, name: str, found: Any) -> bytearray:
        """Return the bytes of a tensor."""
        leaf = self.find(name, found)
        buffer = bytearray(leaf.stored.nbytes)
        with self.checkpoint({name: leaf}).opened() as read:
            read(name, 0, memoryview(buffer))
        return buffer

    def number(self, found: Any, name: str) -> int | float:
        """Return a number that is stored as a plain value or as a tensor of one element."""
        if isinstance(found, PickledTensor | StoredLeaf):
            leaf = self.find(name, found)
            kind = _NUMBERS.get(leaf.stored.kind.code)
            if leaf.stored.size == 1 and kind is not None:
                value: int | float = np.frombuffer(self.read(name, leaf), kind)[0].item()
                return value
        if not isinstance(found, int | float):
            raise CheckpointError(f"{self.path}: {name!r} is not a number")
        return found

    def whole(self, found: Any, name: str) -> int:
        """Return a stored integer, at least 0; raise a CheckpointError for any other value."""
        value = self.number(found, name)
        if not 0 <= value <= MAX_STEPS or value != int(value):
            raise CheckpointError(f"{self.path}: {name!r} is {value}, expected a count")
        return int(value)


_NUMBERS: Final = {
    **{"f64": "<f8", "f32": "<f4", "f16": "<f2", "bool": "|b1"},
    **{f"{sign}{8 * size}": f"<{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8)},
}
"""Dtype code to NumPy dtype string, for tensors that hold one number."""


def open_content(path: Path, key: str | None) -> tuple[Content, Checkpoint | None]:
    """Open the nested mappings of a checkpoint.

    Also return its checkpoint if it holds nothing but tensors by name, as safetensors does.
    """
    if (file := open_torch_file(path)) is not None:
        state = torch_file.read(file)
        part = state.content if key is None else torch_file.part_of(state.content, key, path)
        return Content(path, part if isinstance(part, Mapping) else {"": part}, state), None
    if (path / ".metadata").exists():
        nested = _nest(dcp.opened(path))
        part = nested if key is None else torch_file.part_of(nested, key, path)
        mapping = part if isinstance(part, Mapping) else {"": part}
        return Content(path, mapping, None, "torch.distributed"), None
    whole = open_checkpoint(path, key)
    leaves = {name: StoredLeaf(one, whole.places[name]) for name, one in whole.tensors.items()}
    return Content(path, leaves, None, whole.format), whole


_DEEPEST: Final = 64
"""Limit on the nesting of a saved state."""


def _nest(folder: dcp.Folder) -> dict[Any, Any]:
    """Return the state that was saved in a folder of torch.distributed.checkpoint."""
    found: dict[Any, Any] = {}
    leaves: dict[str, Any] = {
        key: StoredLeaf(one.tensor, dcp.stretches_of(key, one))
        for key, one in folder.tensors.items()
    }
    for key, leaf in (leaves | dcp.plain_values(folder)).items():
        inner = found
        place = folder.places.get(key, (key,))
        named = all(isinstance(one, str | int) for one in place)
        if not named or not 0 < len(place) <= _DEEPEST:
            raise CheckpointError(f"{folder.path}: {key!r} has an invalid place in the state")
        *parents, last = place
        for one in parents:
            inner = inner.setdefault(one, {})
            if not isinstance(inner, dict):
                raise CheckpointError(f"{folder.path}: {key!r} is inside another entry")
        inner[last] = leaf
    return {name: _with_lists(one) for name, one in found.items()}


def _with_lists(found: Any) -> Any:
    """Turn mappings of positions, which were lists when they were saved, back into lists."""
    if not isinstance(found, dict):
        return found
    inner = {name: _with_lists(one) for name, one in found.items()}
    if inner and all(isinstance(name, int) for name in inner):
        return [inner[name] for name in sorted(inner)]
    return inner


def collect_tensors(content: Content, part: Any) -> Checkpoint:
    """Collect the tensors of a part of a file under names without wrapper prefixes."""
    held = content.tensors(part)
    return content.locate(dict(zip(plain_names(list(held)), held.values(), strict=True)))
