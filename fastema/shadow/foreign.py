"""Recognize the checkpoints of other libraries, and name the call that reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from fastema.bridges.memory import bytes_of, row_major_on_host
from fastema.errors import FastemaError
from fastema.shadow.store import PARTS

__all__ = ["explain_foreign_state", "unflatten_state"]

_PLAIN: Final = "state"
"""Name of the file's tensor that holds the state's plain values, as JSON."""

_TENSOR: Final = re.compile(rf"({'|'.join(PARTS)})\.(\d+)\.(.+)", re.DOTALL)


def unflatten_state(state: Any) -> Any:
    """Return the state dict in a fastema file that ``safetensors.torch.load_file`` has read.

    Anything else is returned unchanged.
    """
    if not isinstance(state, Mapping) or _PLAIN not in state or not _is_flat(state):
        return state
    try:
        found: Any = json.loads(bytes(bytes_of(row_major_on_host(state[_PLAIN]))))
        parts: dict[str, dict[int, dict[str, Any]]] = {}
        for key, tensor in state.items():
            match = _TENSOR.fullmatch(key)
            if match:
                part, place, name = match.groups()
                parts.setdefault(part, {}).setdefault(int(place), {})[name] = tensor
        lists = {part: [of[i] for i in range(len(of))] for part, of in parts.items()}
        return {**found, **lists}
    except (FastemaError, ValueError, KeyError, TypeError):
        return state


def _is_flat(state: Mapping[Any, Any]) -> bool:
    names = [name for name in state if name != _PLAIN]
    return bool(names) and all(isinstance(n, str) and _TENSOR.fullmatch(n) for n in names)


def explain_foreign_state(state: Any) -> str:
    """Return a message that says why an object is not a fastema state, and which call reads it."""
    lacks = "it is not a fastema state dict"
    if not isinstance(state, Mapping) or not state:
        return lacks
    if _is_flat(state):
        return (
            f"{lacks}, but the tensors of one without its plain values, as a generic reader of the "
            "file returns: read it with fastema.checkpoint.load_state(path, like=ema.shadow)"
        )
    inside = [name for name, one in state.items() if isinstance(one, Mapping) and "format" in one]
    for name in inside:
        if state[name]["format"] == "fastema":
            return f"{lacks}, but holds one: load the entry {name!r}"
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
