"""Averages in files: safetensors, written whole or not at all, read as they lie on disk.

``save(ema, path)`` and ``load_into(ema, path)`` keep an average in a file, whose state is what
``load_state(path, like)`` reads. ``open_checkpoint(path)`` says what a finished checkpoint of any
layout holds, and ``average(paths, weights, out)`` averages some.
"""

from fastema.checkpoint.merge import average
from fastema.checkpoint.saving import load_into, save, wait
from fastema.checkpoint.source import Checkpoint, open_checkpoint
from fastema.checkpoint.state import load_state

__all__ = [
    "Checkpoint",
    "average",
    "load_into",
    "load_state",
    "open_checkpoint",
    "save",
    "wait",
]
