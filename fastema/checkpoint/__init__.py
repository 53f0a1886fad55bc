"""Averages in files: safetensors, written whole or not at all, read as they lie on disk.

``load_state(path, like)`` reads the state of an average from a file; ``open_checkpoint(path)`` says
what a finished checkpoint of any layout holds, and ``average(paths, weights, out)`` averages some.
"""

from fastema.checkpoint.merge import average
from fastema.checkpoint.source import Checkpoint, open_checkpoint
from fastema.checkpoint.state import load_state

__all__ = ["Checkpoint", "average", "load_state", "open_checkpoint"]
