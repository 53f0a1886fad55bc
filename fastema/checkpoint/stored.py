"""Averages found in the files of any library: who wrote them, and how they go on."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastema.checkpoint.content import gathered, open_content
from fastema.checkpoint.layouts import Names, read
from fastema.checkpoint.source import Checkpoint, open_checkpoint
from fastema.errors import CheckpointError, FastemaError
from fastema.rules import Schedule

__all__ = ["StoredAverage", "load", "open_weights"]


@dataclass(frozen=True)
class StoredAverage:
    """An average in a file or folder, whoever wrote it.

    Attributes
    ----------
    path : Path
    library : str
        "fastema", "fastema.posthoc", "fastema.average", a library that ``fastema.compat`` has a
        module for ("torch_ema", "diffusers", "swa_utils", ...); "model" for a model's weights
        alone, and "state dict" for an average beside them, under "ema" or the like.
    checkpoint : Checkpoint
        The averages by name; its ``opened()`` reads them.
    names : {"full", "without dots", "places"}
        How they are called: as in the model; as there, but for the dots (LitEma); or "0", "1", ...
        in the order of ``model.parameters()`` (torch_ema, diffusers, NeMo).
    num_updates : int or None
        Where the library counts.
    schedule : Schedule or None
        That of its further updates, as fastema would continue with it; None where the file does not
        tell, or fastema has no such rule.
    options : dict
        What the library keeps of its schedule, by its own names.
    weights : dict of str to StoredTensor
        Of the model in training, where the file holds them too.
    notes : list of str
        What else should be known.
    """

    path: Path
    library: str
    checkpoint: Checkpoint
    names: Names = "full"
    num_updates: int | None = None
    schedule: Schedule | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)


def load(path: str | os.PathLike[str], *, key: str | None = None, index: int = 0) -> StoredAverage:
    """Find the average in a checkpoint, and say which library wrote it.

    No tensor is read: ``checkpoint.opened()`` of the result reads them, :func:`load_into` and
    :func:`convert` take them further.

    Parameters
    ----------
    path : path
        Of :func:`save`, of a drop-in's or its owner's state, saved with ``torch.save``; of a
        checkpoint of Lightning, timm, NeMo, Composer, MMEngine, D2Go or Stable Diffusion; of a
        diffusers folder; of anything else that :func:`open_checkpoint` reads.
    key : str, optional
        Where the state is among other things, with dots between the keys. By default it is looked
        for.
    index : int
        Which of several averages of a file of fastema's.

    Raises
    ------
    CheckpointError
        If it cannot be read, or holds nothing at ``key``.
    ArgumentError
        If there are not so many averages.

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
    content, whole = open_content(Path(path), key)
    try:
        library, found = read(content, whole, index)
    except FastemaError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no state of an average: {error}") from None
    if found is None:
        return StoredAverage(Path(path), "model", whole or open_checkpoint(path, key))
    averages = gathered(content, found.averages)
    if not averages.tensors:
        raise CheckpointError(f"{path} holds an average of nothing ({library})")
    return StoredAverage(
        Path(path),
        library,
        averages,
        found.names,
        found.num_updates,
        found.schedule,
        dict(found.options),
        None if found.weights is None else gathered(content, found.weights),
        list(found.notes),
    )


def open_weights(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Open a checkpoint; of a state of fastema's own, the average by the names of its model.

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
            f"{path} holds {len(averages)} averages: write the one that is meant to a file, with "
            "`fastema convert --to safetensors --index 0` or another index"
        )
    step = stored.num_updates if found.step is None else found.step
    return replace(stored.checkpoint, step=step)
