"""Names of variables, from which names of averages are derived."""

from __future__ import annotations

import re
from typing import Any, Final

import tensorflow as tf

__all__ = ["name_of", "stem_of"]

# The counter that Keras appends to a layer's name if an earlier layer of the process has that name.
_COUNTER: Final = re.compile(r"_(\d+)(?=/|$)")


def name_of(variable: Any) -> str:
    """Return a variable's name in TensorFlow, without the output number ``:0``."""
    return str(variable.name).removesuffix(":0")


def stem_of(obj: Any) -> tuple[str, list[tuple[str, int]]]:
    """Return a variable's name without layer counters, and a sort key for equal names."""
    if isinstance(obj, tf.Variable):
        return name_of(obj), []
    path = str(obj.path)
    found = [(part, _COUNTER.search(part)) for part in path.split("/")]
    order = [(_COUNTER.sub("", part), int(count[1]) if count else 0) for part, count in found]
    return _COUNTER.sub("", path), order
