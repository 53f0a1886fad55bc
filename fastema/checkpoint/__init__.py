"""Save and load averages, convert them between libraries, and average finished checkpoints.

``save(ema, path)`` and ``load_into(ema, path)`` keep an average in a safetensors file, which is
written atomically. ``load(path)`` finds the average in a file of any library that
``fastema.compat`` knows, ``inspect(path)`` describes it, and ``convert(src, dst, to=...)`` writes
it in another library's layout. ``average(paths, weights, out)`` averages finished checkpoints,
``best(paths, scores, n, mode=...)`` chooses some by their scores, and ``open_checkpoint(path)``
lists the tensors of one.
"""

from fastema.checkpoint.conversion import Conversion, convert
from fastema.checkpoint.inspection import Description, inspect
from fastema.checkpoint.layout import StoredAverage
from fastema.checkpoint.merge import average
from fastema.checkpoint.saving import load_into, save, wait
from fastema.checkpoint.select import best
from fastema.checkpoint.source import Checkpoint, open_checkpoint
from fastema.checkpoint.state import load_state
from fastema.checkpoint.stored import load

__all__ = [
    "Checkpoint",
    "Conversion",
    "Description",
    "StoredAverage",
    "average",
    "best",
    "convert",
    "inspect",
    "load",
    "load_into",
    "load_state",
    "open_checkpoint",
    "save",
    "wait",
]
