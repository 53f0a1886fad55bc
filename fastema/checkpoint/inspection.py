"""Describe checkpoints: the library that wrote one, its schedule, and its integrity."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastema.checkpoint import dcp, files, torch_file
from fastema.checkpoint.layout import StoredAverage
from fastema.checkpoint.source import Checkpoint, open_torch_file
from fastema.checkpoint.state import verify_checksums
from fastema.checkpoint.stored import load
from fastema.errors import CheckpointError
from fastema.rules.reach import Reach, effective_steps

__all__ = ["Description", "inspect", "verify_files"]


@dataclass(frozen=True)
class Description:
    """The description of a checkpoint.

    Attributes
    ----------
    average : StoredAverage
        Library, names, updates, schedule and tensors; see :func:`load`.
    reach : Reach or None
        How far the average lags behind the weights, in steps; None if the schedule or the number
        of updates is unknown.
    parameters : int
        The number of elements in the averages.
    nbytes : int
        The size of the averages in bytes.
    dtypes : dict of str to int
        Dtype code to the number of tensors with it.
    checked : str
        What was verified: "checksums", or "sizes" if the file has no checksums or ``check`` was
        False.
    """

    average: StoredAverage
    reach: Reach | None
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    checked: str

    @property
    def checkpoint(self) -> Checkpoint:
        """The averaged tensors by name."""
        return self.average.checkpoint

    def to_dict(self) -> dict[str, Any]:
        """Return the description as strings, numbers, lists and dicts, for JSON."""
        average, schedule = self.average, self.average.schedule
        return {
            "path": str(average.path),
            "library": average.library,
            "format": self.checkpoint.format,
            "step": self.checkpoint.step,
            "num_updates": average.num_updates,
            "schedule": None if schedule is None else schedule.to_dict(),
            "options": average.options,
            "mean_age": None if self.reach is None else self.reach.mean_age,
            "std_age": None if self.reach is None else self.reach.std_age,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": self.dtypes,
            "names": average.names,
            "tensors": {
                name: {"dtype": one.kind.code, "shape": list(one.shape)}
                for name, one in self.checkpoint.tensors.items()
            },
            "holds_weights": average.weights is not None,
            "checked": self.checked,
            "notes": average.notes,
        }


def inspect(
    path: str | os.PathLike[str], *, key: str | None = None, index: int = 0, check: bool = False
) -> Description:
    """Describe a checkpoint's library, schedule, step and tensors, and check that it is complete.

    Parameters
    ----------
    path, key, index
        See :func:`load`.
    check : bool
        Also read all data and compare it with the checksums in the file. Files of :func:`save`
        and of ``torch.save`` have checksums; other safetensors files do not. Default False.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read, is cut short, or a checksum differs.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np, fastema
    >>> from fastema.checkpoint import inspect, save
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "ema.safetensors"
    >>> ema = fastema.EMA([np.ones(3)], decay=0.9)
    >>> ema.update()
    >>> save(ema, path)
    >>> found = inspect(path, check=True)
    >>> found.average.library, found.parameters, found.checked
    ('fastema', 3, 'checksums')
    """
    found = load(path, key=key, index=index)
    missing = [one for one in found.checkpoint.files if not one.is_file()]
    if missing:
        raise CheckpointError(f"{path} is incomplete: {missing[0].name} is missing")
    tensors = found.checkpoint.tensors.values()
    dtypes: dict[str, int] = {}
    for one in tensors:
        dtypes[one.kind.code] = dtypes.get(one.kind.code, 0) + 1
    return Description(
        found,
        _reach(found),
        sum(one.size for one in tensors),
        sum(one.nbytes for one in tensors),
        dtypes,
        verify_files(found) if check else "sizes",
    )


def _reach(found: StoredAverage) -> Reach | None:
    schedule, count = found.schedule, found.num_updates
    if schedule is None or not count or count <= schedule.start_after:
        return None
    return effective_steps(schedule.rules[0], count - schedule.start_after, schedule.update_every)


def verify_files(found: StoredAverage) -> str:
    """Return what was verified of an average's files; raise a CheckpointError if they differ."""
    if found.checkpoint.format == "torch.distributed":
        dcp.check(found.path)
        return "checksums"
    paths = dict.fromkeys(found.checkpoint.files)
    good = [_verify_file(path) for path in paths]
    return "checksums" if all(good) else "sizes"


def _verify_file(path: Path) -> bool:
    """Return whether a file has checksums; raise a CheckpointError if one differs."""
    if (file := open_torch_file(path)) is not None:
        torch_file.check(file)
        return True
    try:
        found = files.read(path)
    except CheckpointError:
        if path.suffix == ".safetensors":
            raise
        return False  # an index, or a part of another format
    return verify_checksums(found)
