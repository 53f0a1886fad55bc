"""The state of averages other than their tensors, which checkpoints save in part."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from fastema.errors import CheckpointError, StateError
from fastema.plan import Plan

__all__ = ["CheckpointState", "Registry", "VariableGroup"]


class CheckpointState(tf.train.experimental.PythonState):  # type: ignore[misc]
    """The saved state other than tensors; a child in TensorFlow's object graph."""

    def __init__(self) -> None:
        # The weight of the initial zero in each averaged tensor: the product of all decays.
        self.remaining: dict[str, float] = {}
        self.steps: dict[str, int] = {}  # updates of each stochastically rounded average
        self.swapped = False

    def serialize(self) -> str:
        """Return the state for a checkpoint, as JSON."""
        if self.swapped:
            raise StateError(
                "a checkpoint would hold the weights as the averages: save it outside of swapped()"
            )
        return json.dumps({"remaining": self.remaining, "steps": self.steps}, sort_keys=True)

    def deserialize(self, string_value: bytes) -> None:
        """Merge in the state of a checkpoint; called by TensorFlow when it restores one."""
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
class VariableGroup:
    """A list of variables passed to ``apply()``, their averages, and the plan that updates them."""

    objects: list[Any]  # kept alive, since the cache identifies objects by their addresses
    averages: dict[str, Any]  # by name in the checkpoint, without duplicates
    variables: dict[str, Any]
    rounds_stochastically: bool  # whether any variable is 16-bit and rounded stochastically
    plan: Plan | None = None  # created at the first update: tracing has no memory


@dataclass(eq=False)
class Registry:
    """State hidden from TensorFlow's attribute tracking, which would wrap and save it."""

    names: dict[Any, str] = field(default_factory=dict)  # by tf.Variable.ref(), oldest first
    entries: dict[Any, VariableGroup] = field(
        default_factory=dict
    )  # by the objects' addresses and names
    titles: set[str] = field(default_factory=set)  # averages' names as TensorFlow prints them

    def __deepcopy__(self, memo: dict[int, Any]) -> Registry:
        """Return a registry that refers to the copies of the variables."""
        copies = {deepcopy(ref.deref(), memo).ref(): name for ref, name in self.names.items()}
        return Registry(copies, titles=set(self.titles))
