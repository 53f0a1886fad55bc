"""Files of :class:`PostHocEMA`: written, found, and summed while they are read."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastema.bridges.registry import describe
from fastema.checkpoint.files import File, StoredTensor, moved_into_place
from fastema.checkpoint.sums import weighted_sum
from fastema.errors import CheckpointError, listed

__all__ = ["SnapshotFile", "find", "read", "weighted", "write"]

_NAME: Final = re.compile(r"(\d+)\.(\d+)\.pt")

_PREFIX: Final = "ema_model."


class SnapshotFile(NamedTuple):
    """A file with one of the averages at one step."""

    path: Path
    which: int
    step: int


def write(folder: Path, which: int, state: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write ``{which}.{step}.pt``, whole or not at all: floats in a dtype, all else as it is."""
    path = folder / f"{which}.{int(state['step'].item())}.pt"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder any more: make it again for {path.name}")
    with moved_into_place(path) as partial:
        torch.save({name: _stored(value, dtype) for name, value in state.items()}, partial)


def _stored(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device="cpu", dtype=dtype if value.is_floating_point() else None, copy=True)


def find(folder: Path, count: int) -> list[SnapshotFile]:
    """The snapshots in a folder, by step; those before the first update are left out.

    A CheckpointError if there are none, or one is of an average beyond ``count``.
    """
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("*.pt")]
    every = [SnapshotFile(path, int(hit[1]), int(hit[2])) for path, hit in matches if hit]
    beyond = [f"{one.path.name} is of average {one.which}" for one in every if one.which >= count]
    if beyond:
        raise CheckpointError(
            f"{folder} holds snapshots of another run, with more than {count} averages:\n"
            + listed(sorted(beyond))
        )
    kept = sorted((one for one in every if one.step > 0), key=lambda one: (one.step, one.which))
    if not kept:
        raise CheckpointError(f"no snapshots in {folder}; checkpoint() makes them")
    return kept


def read(path: Path) -> dict[str, Any]:
    """The averaged model's state in a snapshot, mapped into memory; a CheckpointError for none."""
    try:
        state = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
        return {
            name.removeprefix(_PREFIX): value.detach() if isinstance(value, Tensor) else value
            for name, value in state.items()
            if name.startswith(_PREFIX)
        }
    except Exception as error:
        raise CheckpointError(f"{path} is no snapshot: {error}") from error


class _Mapped(File):
    """A snapshot that torch has mapped into memory, as a file whose offsets are addresses."""

    rows: dict[str, Tensor]
    """Owner of the memory, row-major."""

    @contextmanager
    def opened(self) -> Iterator[Callable[[int, memoryview], None]]:
        def fill(address: int, buffer: memoryview) -> None:
            # Other threads go on meanwhile, as they would not while a memoryview is filled.
            ctypes.memmove((ctypes.c_char * len(buffer)).from_buffer(buffer), address, len(buffer))

        yield fill


def _mapped(path: Path, names: Sequence[str]) -> _Mapped:
    state, rows = read(path), {}
    for name in names:
        value = state.get(name)
        if isinstance(value, Tensor):
            if value.layout is not torch.strided:
                raise CheckpointError(f"{name!r} is sparse in {path}: expected a dense tensor")
            rows[name] = value.contiguous()
    tensors = {
        name: StoredTensor(describe(row).kind, tuple(row.shape), row.data_ptr())
        for name, row in rows.items()
    }
    file = _Mapped(path, tensors, {})
    file.rows = rows
    return file


def weighted(
    paths: Sequence[Path], coefficients: Sequence[float], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Sums of snapshots' tensors in float64, a few MB of each file at a time.

    What is summed has the names and shapes of ``like``; the sums are in float32, or float64 where
    ``like`` is. A CheckpointError lists every tensor that a file does not have, or has in another
    shape or dtype.
    """
    names = list(like)
    files = [_mapped(path, names) for path in paths]
    problems = []
    for file in files:
        for name in names:
            here, there = file.tensors.get(name), files[-1].tensors.get(name)
            if here is None:
                problems.append(f"{name!r} is not in {file.path.name}")
            elif here.shape != tuple(like[name].shape):
                problems.append(
                    f"{name!r} has the shape {list(here.shape)} in {file.path.name}, and "
                    f"{list(like[name].shape)} in the model"
                )
            elif here.kind.real is None:
                problems.append(f"{name!r} is {here.kind.code} in {file.path.name}, no float")
            elif there is not None and here.kind != there.kind:
                problems.append(f"{name!r} is {here.kind.code} in {file.path.name}, not as later")
    if problems:
        raise CheckpointError("the snapshots do not fit the model:\n" + listed(problems))
    result = {name: _wide(files[-1].tensors[name], tensor) for name, tensor in like.items()}
    memory = {name: (array, describe(array)) for name, array in result.items()}
    weighted_sum(files, coefficients, memory, names)
    return {name: torch.from_numpy(array) for name, array in result.items()}


def _wide(stored: StoredTensor, like: Tensor) -> NDArray[Any]:
    """Memory for a sum."""
    dtype = "f8" if like.dtype in (torch.float64, torch.complex128) else "f4"
    return np.empty(stored.shape, np.result_type(dtype, "c8") if stored.kind.parts == 2 else dtype)
