"""Select the checkpoints in a folder to average."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from fastema.checkpoint.source import PROVENANCE, Checkpoint
from fastema.checkpoint.stored import open_weights
from fastema.errors import ArgumentError, CheckpointError, format_problems

__all__ = ["select"]

_ENDINGS: Final = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}


def select(
    folder: str | os.PathLike[str],
    *,
    last: int | None = None,
    window: int | None = None,
    min_spacing: int = 0,
    key: str | None = None,
) -> list[Checkpoint]:
    """Return the checkpoints in a folder, oldest first, by the step in their metadata or name.

    Parameters
    ----------
    folder : path
        A folder with one file or folder per checkpoint. Results of earlier averaging are ignored.
    last : int, optional
        Return only the ``last`` newest checkpoints. Applied after the other filters.
    window : int, optional
        Return only checkpoints less than ``window`` steps older than the newest.
    min_spacing : int
        Minimum number of steps between two checkpoints, counted back from the newest. Default 0.
    key : str, optional
        Dotted key of the weights in each checkpoint; see :func:`open_checkpoint`.

    Raises
    ------
    CheckpointError
        If the folder holds no checkpoints, one of them cannot be read, or a step is unknown or
        occurs twice.
    ArgumentError
        If fewer than ``last`` checkpoints remain.
    """
    root = Path(folder)
    try:
        entries = sorted(entry for entry in root.iterdir() if _may_be(entry))
    except OSError as error:
        raise CheckpointError(f"cannot read {root}: {error.strerror or error}") from None
    every = (open_weights(entry, key) for entry in entries)
    found = [one for one in every if PROVENANCE not in one.metadata]
    if not found:
        raise CheckpointError(f"{root} holds no checkpoints")
    unknown = [one.path.name for one in found if one.step is None]
    if unknown:
        raise CheckpointError(
            "the step is not known from the name or the metadata of\n"
            + format_problems(unknown)
            + "\nName the checkpoints one by one, oldest first."
        )
    steps = {one.path.name: one.step or 0 for one in found}
    if len({(one.step, one.metadata.get("gamma")) for one in found}) < len(found):
        raise CheckpointError(
            f"{root}: the steps are not distinct: "
            + ", ".join(f"{name} at {step}" for name, step in list(steps.items())[:4])
            + "; name them one by one, oldest first"
        )
    found.sort(key=lambda one: (steps[one.path.name], one.path.name))
    newest = steps[found[-1].path.name]
    taken: list[Checkpoint] = []
    for one in reversed(found):
        step = steps[one.path.name]
        far = not taken or steps[taken[-1].path.name] - step >= min_spacing
        if far and (window is None or step > newest - window):
            taken.append(one)
    if last is not None and len(taken) < last:
        raise ArgumentError(f"last={last}: {len(taken)} checkpoints of {root} qualify")
    return taken[:last][::-1]


def _may_be(entry: Path) -> bool:
    """Return whether a file or folder may be a checkpoint by its name; hidden entries are not."""
    if entry.name.startswith("."):
        return False
    if entry.is_dir():
        return any(one.suffix in _ENDINGS or one.name == ".metadata" for one in entry.iterdir())
    return entry.suffix in _ENDINGS
