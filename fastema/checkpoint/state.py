"""States of averages, and other tensors, in safetensors files with checksums."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastema.average.state import HEADER
from fastema.bridges.memory import bytes_of, row_major_on_host
from fastema.bridges.registry import describe, memory_of
from fastema.checkpoint import files
from fastema.errors import CheckpointError, DTypeError

if TYPE_CHECKING:
    from fastema.checkpoint.source import Checkpoint

__all__ = [
    "is_state",
    "load_state",
    "read_state",
    "read_tensors",
    "verify_checksums",
    "write_tensors",
]

_SUMS: Final = "crc32"
"""Metadata key of the checksums of all tensors."""


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], **metadata: str
) -> None:
    """Write tensors, such as a state, and their checksums to a safetensors file, atomically."""
    arrays = {name: row_major_on_host(one) for name, one in tensors.items()}
    specs = {name: describe(array) for name, array in arrays.items()}
    sums = {name: zlib.crc32(bytes_of(array)) for name, array in arrays.items()}
    files.write(path, specs, **{_SUMS: json.dumps(sums)}, **metadata)


def read_tensors(found: files.File | Checkpoint, like: Any) -> dict[str, Any]:
    """Read tensors into arrays of the framework of ``like``, or of NumPy if it is None.

    Raise a CheckpointError if that framework has no such dtype, or if a checksum of a safetensors
    file differs. Without checksums, as other programs write the file, nothing is verified. A
    checkpoint may have other names than its files: verify those.
    """
    bridge = memory_of(np.empty(0) if like is None else like)
    sums = _checksums(found) if isinstance(found, files.File) else None
    tensors = {}
    with found.opened() as read:
        for name, stored in found.tensors.items():
            try:
                array = bridge.zeros(stored.size, stored.kind.code, "cpu").reshape(stored.shape)
            except DTypeError as error:
                raise CheckpointError(f"{found.path}: {error}") from None
            read(name, 0, bytes_of(array))
            if sums is not None and sums.get(name) != zlib.crc32(bytes_of(array)):
                raise _damaged(found.path, name)
            tensors[name] = array
    return tensors


def _checksums(found: files.File) -> dict[str, Any] | None:
    """Return the checksums in a file's metadata, or None if it has none."""
    if _SUMS not in found.metadata:
        return None
    try:
        sums = json.loads(found.metadata[_SUMS])
    except (ValueError, RecursionError):
        sums = None
    if not isinstance(sums, dict):
        raise CheckpointError(f"{found.path} is damaged: its checksums are not a mapping")
    return sums


def is_state(found: files.File) -> bool:
    """Return whether a file holds the state of an average."""
    return HEADER in found.tensors


def verify_checksums(found: files.File) -> bool:
    """Return whether a file has checksums; raise a CheckpointError if one differs."""
    sums = _checksums(found)
    if sums is None:
        return False
    with found.opened() as read:
        for name, stored in found.tensors.items():
            crc = 0
            for _, part in files.pieces_of(read, name, stored):
                crc = zlib.crc32(part, crc)
            if sums.get(name) != crc:
                raise _damaged(found.path, name)
    return True


def _damaged(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {name!r} differs from what was written")


def read_state(found: files.File, like: Any) -> dict[str, Any]:
    """Read the state in a file into arrays of the framework of ``like``.

    Raise a CheckpointError if the file holds none, or a checksum differs.
    """
    if not is_state(found):
        raise CheckpointError(f"{found.path} does not hold the state of an average")
    return read_tensors(found, like)


def load_state(path: str | os.PathLike[str], like: Any) -> dict[str, Any]:
    """Read the state of an average from a file, for ``load_state_dict``.

    One such file is the ``ema.safetensors`` that :class:`fastema.transformers.EMACallback` saves
    with each checkpoint of the ``Trainer``.

    Parameters
    ----------
    path : path
        A file of :func:`save`.
    like : array, or mapping of arrays
        Any array of the framework to load into, such as ``ema.shadow``. The loaded arrays are on
        the CPU.

    Raises
    ------
    CheckpointError
        If the file does not hold the state of an average, or is damaged.

    Examples
    --------
    >>> import fastema, torch
    >>> ema = fastema.EMA(torch.nn.Linear(3, 2))
    >>> state = load_state("checkpoint-500/ema.safetensors", ema.shadow)   # doctest: +SKIP
    >>> ema.load_state_dict(state)                                         # doctest: +SKIP
    """
    array = next(iter(like.values())) if isinstance(like, Mapping) else like
    return read_state(files.read(path), array)
