"""Averages in files: safetensors, written whole or not at all, read as they lie on disk.

``load_state(path, like)`` reads the state of an average from a file.
"""

from fastema.checkpoint.state import load_state

__all__ = ["load_state"]
