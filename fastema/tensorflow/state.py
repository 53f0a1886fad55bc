"""The state of an average besides its tensors: saved in checkpoints, or not."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from fastema.errors import CheckpointError, StateError
from fastema.plan import Plan

__all__ = ["Entry", "Registry", "State"]


class State(tf.train.experimental.PythonState):  # type: ignore[misc]
    """The part of the state that is no tensor; a child of the object graph."""

    def __init__(self) -> None:
        # Of an averaged tensor, the share that zero still has in it: the product of the decays.
        self.remaining: dict[str, float] = {}
        self.steps: dict[str, int] = {}  # updates of the averages that are rounded at random
        self.swapped = False

    def serialize(self) -> str:
        """Return what a checkpoint keeps, as JSON."""
        if self.swapped:
            raise StateError(
                "a checkpoint would hold the weights as the averages: save it outside of swapped()"
            )
        return json.dumps({"remaining": self.remaining, "steps": self.steps}, sort_keys=True)

    def deserialize(self, string_value: bytes) -> None:
        """Take over what a checkpoint has; called by TensorFlow while it restores."""
        if self.swapped:
            raise StateError("restore a checkpoint outside of swapped()")
        try:
            kept = json.loads(string_value)
            remaining = {str(k): float(v) for k, v in kept["remaining"].items()}
            steps = {str(k): int(v) for k, v in kept["steps"].items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"the checkpoint's record of an average cannot be read: {string_value[:200]!r}"
            ) from None
        self.remaining |= remaining
        self.steps |= steps


@dataclass(eq=False)
class Entry:
    """A list of variables as it was given once, and what updates it."""

    given: list[Any]  # kept, so that no other object gets the address of one
    averages: dict[str, Any]  # by name in the checkpoint, each variable once
    variables: dict[str, Any]
    narrow: bool  # one of them is of 16 bits and rounded at random
    plan: Plan | None = None  # made at the first update: while tracing there is no memory


@dataclass(eq=False)
class Registry:
    """Attributes hidden from TensorFlow's tracking, which would wrap and save them."""

    names: dict[Any, str] = field(default_factory=dict)  # by tf.Variable.ref(), as they came
    entries: dict[Any, Entry] = field(default_factory=dict)  # by the objects' addresses, and names
    titles: set[str] = field(default_factory=set)  # averages' names as TensorFlow prints them

    def __deepcopy__(self, memo: dict[int, Any]) -> Registry:
        """The books of a copied average, about the copies of the variables."""
        copies = {deepcopy(ref.deref(), memo).ref(): name for ref, name in self.names.items()}
        return Registry(copies, titles=set(self.titles))
