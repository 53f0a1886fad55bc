"""States of averages in files: their plain values in the header, their tensors as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from fastema.bridges.memory import bytes_of, row_major_on_host
from fastema.bridges.registry import describe, memory_of
from fastema.checkpoint import files
from fastema.errors import CheckpointError

__all__ = ["read_state", "write_state"]

_KEY = "state"
"""Of the plain values among a file's annotations."""


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any], **metadata: str) -> None:
    """Write a state dict; whatever happens, there is the old file or the whole new one.

    Parameters
    ----------
    path : path
        Its folder must exist.
    state : mapping
        Of ``state_dict()``: a tensor ``name`` of the i-th mapping in a list ``part`` is called
        ``part.i.name`` in the file.
    **metadata : str
        Further annotations.

    Raises
    ------
    CheckpointError
        If the safetensors package is missing, or a tensor has a dtype that it does not know.
    OSError
        If the file cannot be written.
    """
    plain: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, list):
            for i, tensors in enumerate(value):
                arrays |= {
                    f"{key}.{i}.{name}": row_major_on_host(one) for name, one in tensors.items()
                }
        else:
            plain[key] = value
    specs = {name: describe(array) for name, array in arrays.items()}
    files.write(path, specs, **{_KEY: json.dumps(plain)}, **metadata)


def read_state(found: files.File, like: Any) -> dict[str, Any]:
    """The state dict in a file.

    Parameters
    ----------
    found : File
        Of :func:`fastema.checkpoint.files.read`.
    like : array
        Of the framework whose arrays are wanted.

    Raises
    ------
    CheckpointError
        If it was not written by :func:`write_state`.
    OSError
        If it cannot be read.
    """
    if _KEY not in found.metadata:
        raise CheckpointError(f"{found.path} does not hold the state of an average")
    bridge = memory_of(like)
    state: dict[str, Any] = json.loads(found.metadata[_KEY])
    with found.opened() as fill:
        for key, stored in found.tensors.items():
            part, place, name = key.split(".", 2)
            array = bridge.zeros(stored.size, stored.kind.code, "cpu").reshape(stored.shape)
            fill(stored.offset, bytes_of(array))
            several = state.setdefault(part, [])
            several += [{} for _ in range(int(place) + 1 - len(several))]
            several[int(place)][name] = array
    return state
