"""Recognize the checkpoints of other libraries, and name the call that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from fastema.average.memory import PARTS

__all__ = ["explain_foreign_state"]

_BEGINNINGS: Final = tuple(f"{part}." for part in PARTS)


def explain_foreign_state(state: Any) -> str:
    """Return a message that says why an object is not a fastema state, and which call reads it."""
    lacks = "it is not a fastema state dict"
    if not isinstance(state, Mapping) or not state:
        return lacks
    if all(isinstance(name, str) and name.startswith(_BEGINNINGS) for name in state):
        return (
            f"{lacks}, but tensors with such names, without the tensor 'fastema' that describes "
            "them: a part of a state, or a model's"
        )
    inside = [name for name, one in state.items() if isinstance(one, Mapping) and "fastema" in one]
    if inside:
        return f"{lacks}, but holds one: load the entry {inside[0]!r}"
    # Libraries' layouts stand above averages; only an error asks for them.
    known = import_module("fastema.checkpoint.detection").explain_foreign_state(state)
    if known:
        return f"{lacks}, but {known}"
    if all(isinstance(name, str) and hasattr(one, "shape") for name, one in state.items()):
        return (
            f"{lacks}, but tensors by name, like a model's state: load it into the model, and "
            "build a new average, which begins with these weights"
        )
    return lacks
