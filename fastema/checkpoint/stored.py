"""Averages in the files of any supported library, with their schedules and counters."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from fastema.checkpoint import files
from fastema.checkpoint.content import collect_tensors, open_content
from fastema.checkpoint.detection import detect
from fastema.checkpoint.layout import StoredAverage
from fastema.checkpoint.source import Checkpoint, open_checkpoint, open_torch_file, step_of_name
from fastema.checkpoint.state import is_state
from fastema.errors import CheckpointError, FastemaError

__all__ = [
    "AVERAGE_FILE",
    "TRAINING_FILE",
    "StoredAverage",
    "load",
    "open_own_file",
    "open_weights",
]

AVERAGE_FILE: Final = "ema.safetensors"
"""Name of the file with the average in a checkpoint folder of the Hugging Face Trainer."""

TRAINING_FILE: Final = "training_weights.safetensors"
"""Name of the file with the training weights beside it, if the folder's model is the average."""


def load(path: str | os.PathLike[str], *, key: str | None = None, index: int = 0) -> StoredAverage:
    """Find the average in a checkpoint, and detect which library wrote it.

    No tensors are read. Read them with ``checkpoint.opened()`` of the result, or pass the path to
    :func:`load_into` or :func:`convert`.

    Parameters
    ----------
    path : path
        A file of :func:`save`; a ``torch.save`` file with the state of a drop-in or of the class
        that it replaces; a checkpoint of Lightning, timm, NeMo, Composer, MMEngine, D2Go or Stable
        Diffusion; a diffusers folder; a folder of torch.distributed.checkpoint; a checkpoint folder
        of the Hugging Face ``Trainer`` with the ``ema.safetensors`` of
        :class:`fastema.transformers.EMACallback`; or anything else that :func:`open_checkpoint`
        reads.
    key : str, optional
        Dotted key of the average's state in the checkpoint. Detected by default.
    index : int
        Which average to load from a fastema file that holds several; default 0.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read, or holds nothing at ``key``.
    ArgumentError
        If ``index`` is out of range.

    Examples
    --------
    >>> import tempfile, pathlib, torch
    >>> from fastema.compat.torch_ema import ExponentialMovingAverage
    >>> from fastema.checkpoint import load
    >>> ema = ExponentialMovingAverage([torch.nn.Parameter(torch.ones(3))], decay=0.9)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "ema.pt"
    >>> torch.save(ema.state_dict(), path)
    >>> found = load(path)
    >>> found.library, found.names, found.options
    ('torch_ema', 'places', {'decay': 0.9, 'num_updates': 0})
    """
    beside = open_own_file(Path(path)) if key is None and Path(path).is_dir() else None
    own = None if beside is None else beside.path
    content, whole = open_content(own or Path(path), key)
    try:
        library, found = detect(content, whole, index)
    except FastemaError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the state of an average: {error}") from None
    if found is None:
        return StoredAverage(Path(path), "model", whole or open_checkpoint(path, key))
    averages = collect_tensors(content, found.averages)
    if not averages.tensors:
        raise CheckpointError(f"{path} holds an average without tensors ({library})")
    step = None if whole is None else whole.step
    step = step_of_name(Path(path)) if step is None else step
    weights = None if found.weights is None else collect_tensors(content, found.weights)
    return StoredAverage(
        Path(path),
        library,
        replace(averages, step=step),
        found.names,
        found.num_updates,
        found.schedule,
        dict(found.options),
        weights if own is None else _open_training_weights(own),
        list(found.notes),
        None if found.parameters is None else list(found.parameters),
        None if found.state is None else content.locate(found.state),
    )


def open_own_file(path: Path) -> files.File | None:
    """Open the file of :func:`save` at a path, or beside the model in a folder; None for others."""
    file = path / AVERAGE_FILE if path.is_dir() else path
    if not file.is_file() or open_torch_file(file) is not None:
        return None
    found = files.read(file)
    return found if is_state(found) else None


def _open_training_weights(average: Path) -> Checkpoint | None:
    """Open the training weights in the folder of an average; None if it holds none."""
    own = average.with_name(TRAINING_FILE)
    try:
        found = open_checkpoint(own if own.is_file() else average.parent)
    except CheckpointError:  # no model, or several
        return None
    return None if average in found.files else found


def open_weights(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Open a checkpoint; if it is a fastema state, open its average under the model's names.

    Raises
    ------
    CheckpointError
        If the state holds several averages; see :func:`open_checkpoint` for the rest.
    """
    found = open_checkpoint(path, key)
    averages = {name.split(".")[1] for name in found.tensors if name.startswith("shadow.")}
    if "0" not in averages:
        return found
    stored = load(path, key=key)
    if stored.library != "fastema":
        return found
    if len(averages) > 1:
        raise CheckpointError(
            f"{path} holds {len(averages)} averages: write one of them to a file with "
            "`fastema convert --to safetensors --index 0`, or another index"
        )
    step = stored.num_updates if found.step is None else found.step
    return replace(stored.checkpoint, step=step)
