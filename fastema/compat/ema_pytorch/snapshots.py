"""Snapshot files of :class:`PostHocEMA`: writing, finding, reading and summing them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastema.bridges.registry import describe
from fastema.checkpoint.files import StoredTensor, atomic_write_path
from fastema.checkpoint.source import Checkpoint, open_checkpoint
from fastema.checkpoint.sums import weighted_sum
from fastema.errors import CheckpointError, format_problems

__all__ = ["SnapshotFile", "find_snapshots", "read_snapshot", "sum_snapshots", "write_snapshot"]

_NAME: Final = re.compile(r"(\d+)\.(\d+)\.pt")

_PREFIX: Final = "ema_model."


class SnapshotFile(NamedTuple):
    """The file of one average at one step."""

    path: Path
    average_index: int
    step: int


def write_snapshot(folder: Path, index: int, state: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write ``{index}.{step}.pt`` atomically: floats in ``dtype``, everything else unchanged."""
    path = folder / f"{index}.{int(state['step'].item())}.pt"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is gone: create the folder again for {path.name}")
    with atomic_write_path(path) as partial:
        torch.save({name: _prepare_value(value, dtype) for name, value in state.items()}, partial)


def _prepare_value(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device="cpu", dtype=dtype if value.is_floating_point() else None, copy=True)


def find_snapshots(folder: Path, count: int) -> list[SnapshotFile]:
    """Return a folder's snapshots sorted by step, except those from before the first update.

    Raise a CheckpointError if there are none, or if one belongs to an average beyond ``count``.
    """
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("*.pt")]
    every = [SnapshotFile(path, int(hit[1]), int(hit[2])) for path, hit in matches if hit]
    beyond = [
        f"{one.path.name} has average {one.average_index}"
        for one in every
        if one.average_index >= count
    ]
    if beyond:
        raise CheckpointError(
            f"{folder} holds snapshots of another run, with more than {count} averages:\n"
            + format_problems(sorted(beyond))
        )
    kept = sorted(
        (one for one in every if one.step > 0), key=lambda one: (one.step, one.average_index)
    )
    if not kept:
        raise CheckpointError(f"no snapshots in {folder}; checkpoint() writes them")
    return kept


def read_snapshot(path: Path) -> dict[str, Any]:
    """Return the averaged model's state from a snapshot, memory-mapped.

    Raise a CheckpointError if the file is not a snapshot.
    """
    try:
        state = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
        return {
            name.removeprefix(_PREFIX): value.detach() if isinstance(value, Tensor) else value
            for name, value in state.items()
            if name.startswith(_PREFIX)
        }
    except Exception as error:
        raise CheckpointError(f"{path} is not a snapshot: {error}") from error


def _open_snapshot(path: Path, names: Sequence[str]) -> Checkpoint:
    """Open a snapshot's tensors of these names."""
    found = open_checkpoint(path)
    stored = {name: found.tied.get(_PREFIX + name, _PREFIX + name) for name in names}
    there = {name: one for name, one in stored.items() if one in found.tensors}
    return replace(
        found,
        tensors={name: found.tensors[one] for name, one in there.items()},
        places={name: found.places[one] for name, one in there.items()},
    )


def sum_snapshots(
    paths: Sequence[Path], coefficients: Sequence[float], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return weighted sums of snapshots, computed in float64, a few MB of each file at a time.

    The sums have the names and shapes of ``like``. They are float32, or float64 where ``like`` is.
    Raise a CheckpointError that lists every tensor that a file lacks, or has in another shape or
    dtype.
    """
    names = list(like)
    files = [_open_snapshot(path, names) for path in paths]
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
                problems.append(f"{name!r} is {here.kind.code} in {file.path.name}, not a float")
            elif there is not None and here.kind != there.kind:
                problems.append(f"{name!r} is {here.kind.code} in {file.path.name}, unlike later")
    if problems:
        raise CheckpointError("the snapshots do not fit the model:\n" + format_problems(problems))
    result = {name: _allocate_sum(files[-1].tensors[name], tensor) for name, tensor in like.items()}
    memory = {name: (array, describe(array)) for name, array in result.items()}
    weighted_sum(files, coefficients, memory, names)
    return {name: torch.from_numpy(array) for name, array in result.items()}


def _allocate_sum(stored: StoredTensor, like: Tensor) -> NDArray[Any]:
    """Return uninitialized memory for a sum: float64 where ``like`` is, otherwise float32."""
    dtype = "f8" if like.dtype in (torch.float64, torch.complex128) else "f4"
    return np.empty(stored.shape, np.result_type(dtype, "c8") if stored.kind.parts == 2 else dtype)
