"""Names of variables, from which those of averages are made."""

from __future__ import annotations

import re
from typing import Any, Final

import tensorflow as tf

__all__ = ["name_of", "stem_of"]

# What Keras appends to the name of a layer when another had that name before, anywhere in the
# process.
_COUNTER: Final = re.compile(r"_(\d+)(?=/|$)")


def name_of(variable: Any) -> str:
    """Return the name that TensorFlow gave a variable, without the number of its output."""
    return str(variable.name).removesuffix(":0")


def stem_of(obj: Any) -> tuple[str, list[tuple[str, int]]]:
    """A variable's name without what depends on other objects, and what to sort its equals by."""
    if isinstance(obj, tf.Variable):
        return name_of(obj), []
    path = str(obj.path)
    found = [(part, _COUNTER.search(part)) for part in path.split("/")]
    order = [(_COUNTER.sub("", part), int(count[1]) if count else 0) for part, count in found]
    return _COUNTER.sub("", path), order
