"""Averages in files: safetensors, written whole or not at all, read as they lie on disk.

``save(ema, path)`` and ``load_into(ema, path)`` keep an average in a file. ``load(path)`` finds the
average in a file of any library that ``fastema.compat`` knows, ``inspect(path)`` describes it, and
``convert(src, dst, to=...)`` writes it for another. ``average(paths, weights, out)`` averages
finished checkpoints, whose tensors ``open_checkpoint(path)`` lists.
"""

from fastema.checkpoint.conversion import Conversion, convert
from fastema.checkpoint.inspection import Description, inspect
from fastema.checkpoint.merge import average
from fastema.checkpoint.saving import load_into, save, wait
from fastema.checkpoint.source import Checkpoint, open_checkpoint
from fastema.checkpoint.state import load_state
from fastema.checkpoint.stored import StoredAverage, load

__all__ = [
    "Checkpoint",
    "Conversion",
    "Description",
    "StoredAverage",
    "average",
    "convert",
    "inspect",
    "load",
    "load_into",
    "load_state",
    "open_checkpoint",
    "save",
    "wait",
]
