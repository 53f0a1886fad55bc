"""Averages' state dicts in safetensors files: plain values in the header, tensors unchanged."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from fastema.bridges.memory import bytes_of, row_major_on_host
from fastema.bridges.registry import describe, memory_of
from fastema.checkpoint import files
from fastema.errors import CheckpointError, DTypeError

__all__ = [
    "is_state",
    "load_state",
    "read_state",
    "read_tensors",
    "verify_checksums",
    "write_state",
    "write_tensors",
]

_KEY: Final = "state"
"""Key of the plain values in a file's metadata, and name of the tensor that repeats them."""

_SUMS: Final = "crc32"
"""Metadata key of the checksums of all tensors."""

_PIECE: Final = 1 << 22
"""Bytes to read at a time when only verifying checksums."""


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any], **metadata: str) -> None:
    """Write a state dict to a safetensors file, which is replaced atomically.

    The tensor ``name`` in the i-th mapping of a list ``part`` is stored as ``part.i.name``.
    """
    plain: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            for i, tensors in enumerate(value):
                for name, one in tensors.items():
                    arrays[f"{key}.{i}.{name}"] = one
        else:
            plain[key] = value
    text = json.dumps(plain)
    # safetensors' load_file drops the metadata, so repeat the plain values in a tensor.
    arrays[_KEY] = np.frombuffer(text.encode(), np.uint8)
    write_tensors(path, arrays, **{_KEY: text}, **metadata)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], **metadata: str
) -> None:
    """Write tensors and their checksums to a safetensors file, which is replaced atomically."""
    arrays = {name: row_major_on_host(one) for name, one in tensors.items()}
    specs = {name: describe(array) for name, array in arrays.items()}
    sums = {name: zlib.crc32(bytes_of(array)) for name, array in arrays.items()}
    files.write(path, specs, **{_SUMS: json.dumps(sums)}, **metadata)


def read_tensors(path: str | os.PathLike[str], like: Any) -> dict[str, Any]:
    """Read the tensors of :func:`write_tensors` into arrays of the framework of ``like``.

    Raise a CheckpointError if a checksum differs.
    """
    found, bridge = files.read(path), memory_of(like)
    sums = json.loads(found.metadata.get(_SUMS, "{}"))
    tensors = {}
    with found.opened() as read:
        for name, stored in found.tensors.items():
            tensors[name] = array = _allocate(stored, bridge)
            read(name, 0, bytes_of(array))
            if sums.get(name) != zlib.crc32(bytes_of(array)):
                raise _damaged(found, name)
    return tensors


def _allocate(stored: files.StoredTensor, bridge: Any) -> Any:
    """Return an array for a tensor in the memory of a bridge's framework."""
    return bridge.zeros(stored.size, stored.kind.code, "cpu").reshape(stored.shape)


def is_state(found: files.File) -> bool:
    """Return whether :func:`write_state` wrote a file."""
    return _KEY in found.metadata


def verify_checksums(found: files.File) -> bool:
    """Return whether a file has checksums; raise a CheckpointError if one differs."""
    try:
        sums = json.loads(found.metadata[_SUMS])
    except (KeyError, ValueError, RecursionError):
        return False
    if not isinstance(sums, dict):
        return False
    buffer = memoryview(bytearray(_PIECE))
    with found.opened() as read:
        for name, stored in found.tensors.items():
            crc = 0
            for first in range(0, stored.nbytes, _PIECE):
                part = buffer[: min(_PIECE, stored.nbytes - first)]
                read(name, first, part)
                crc = zlib.crc32(part, crc)
            if sums.get(name) != crc:
                raise _damaged(found, name)
            plain = found.metadata.get(_KEY, "").encode(errors="surrogatepass")
            if name == _KEY and crc != zlib.crc32(plain):
                raise _damaged(found, name)
    return True


def _damaged(found: files.File, name: str) -> CheckpointError:
    return CheckpointError(f"{found.path} is damaged: {name!r} differs from what was written")


def read_state(found: files.File, like: Any) -> dict[str, Any]:
    """Read the state dict in a file into arrays of the framework of ``like``.

    Raise a CheckpointError if :func:`write_state` did not write the file, or a checksum differs.
    """
    if not is_state(found):
        raise CheckpointError(f"{found.path} does not hold the state of an average")
    bridge = memory_of(like)
    try:
        plain = json.loads(found.metadata[_KEY])
        sums = json.loads(found.metadata.get(_SUMS, "{}"))
        places = {key: _parse_key(key) for key in found.tensors if key != _KEY}
        if not isinstance(plain, dict) or any(part in plain for part, _, _ in places.values()):
            raise ValueError("its plain values are not a mapping, or share a name with tensors")
        if not isinstance(sums, dict):
            raise ValueError("its checksums are not a mapping")
        if any(at >= len(places) for _, at, _ in places.values()):
            raise ValueError("it has more averages than tensors")
        state: dict[str, Any] = plain
        with found.opened() as read:
            for key, stored in found.tensors.items():
                array = _allocate(stored, bridge)
                read(key, 0, bytes_of(array))
                if sums.get(key) != zlib.crc32(bytes_of(array)):
                    raise _damaged(found, key)
                if key == _KEY:
                    if bytes(bytes_of(array)) != found.metadata[_KEY].encode():
                        raise _damaged(found, key)
                    continue
                part, place, name = places[key]
                several = state.setdefault(part, [])
                several += [{} for _ in range(place + 1 - len(several))]
                several[place][name] = array
    except CheckpointError:
        raise
    except (ValueError, RecursionError, DTypeError) as error:
        raise CheckpointError(
            f"{found.path} does not hold the state of an average: {error}"
        ) from None
    return state


def _parse_key(key: str) -> tuple[str, int, str]:
    """Split a tensor's key into part, index and name."""
    part, place, name = key.split(".", 2)
    if not (place.isascii() and place.isdigit()):
        raise ValueError(f"no index in the name {key!r}")
    return part, int(place), name


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
