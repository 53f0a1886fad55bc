"""Which checkpoints of a folder are averaged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from fastema.checkpoint.source import PROVENANCE, Checkpoint
from fastema.checkpoint.stored import open_weights
from fastema.errors import ArgumentError, CheckpointError, listed

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
    """Return the checkpoints in a folder, oldest first, by the steps that they or their names say.

    Parameters
    ----------
    folder : path
        With a file or a folder for each checkpoint; averages that are there already are left out.
    last : int, optional
        Only the newest so many.
    window : int, optional
        Only those less than so many steps older than the newest.
    min_spacing : int
        Of those that lie closer together, going back from the newest, only every one that is at
        least so many steps older than the one taken before.
    key : str, optional
        See :func:`open_checkpoint`.

    Raises
    ------
    CheckpointError
        If the folder holds no checkpoints, one cannot be read, or the step of one is not known.
    ArgumentError
        If fewer than ``last`` are left.
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
            "the step is not known, neither from the name nor from the metadata, of\n"
            + listed(unknown)
            + "\nName the checkpoints one by one, oldest first."
        )
    steps = {one.path.name: one.step or 0 for one in found}
    if len({(one.step, one.metadata.get("gamma")) for one in found}) < len(found):
        raise CheckpointError(
            f"{root}: several checkpoints are of one step by their names: "
            + ", ".join(f"{name} of {step}" for name, step in list(steps.items())[:4])
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
        raise ArgumentError(f"last={last}: {len(taken)} checkpoints of {root} are left to choose")
    return taken[:last][::-1]


def _may_be(entry: Path) -> bool:
    """Return whether an entry of a folder is a checkpoint by its name; hidden ones are not."""
    if entry.name.startswith("."):
        return False
    if entry.is_dir():
        return any(one.suffix in _ENDINGS or one.name == ".metadata" for one in entry.iterdir())
    return entry.suffix in _ENDINGS
