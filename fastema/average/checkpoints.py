"""Decide which weights a trainer's checkpoints hold: the average, or the training weights."""

from __future__ import annotations

from typing import Any, Literal

from fastema.average.average import Average
from fastema.average.options import check_literal

__all__ = ["Checkpoints", "choose_checkpoints", "training_weights"]

Checkpoints = Literal["average", "raw"]
"""What the model in a checkpoint is: the average, or the weights that the optimizer trains."""


def choose_checkpoints(given: Checkpoints | None, evaluate_with_average: bool) -> Checkpoints:
    """Return ``given``, or the weights that are evaluated, and hence chosen, in training.

    Raises an ArgumentError for another value.
    """
    if given is None:
        return "average" if evaluate_with_average else "raw"
    check_literal(given, "checkpoints", Checkpoints)
    return given


def training_weights(state: dict[str, Any], ema: Average[Any]) -> dict[str, Any]:
    """Return the tensors of a PyTorch model's state that the average replaces."""
    return {
        name: value
        for name, value in state.items()
        if hasattr(value, "shape") and name not in ema.skipped_names
    }
