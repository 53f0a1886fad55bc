"""Scores of checkpoints, from a JSON file or a training log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastema.errors import ArgumentError
from fastema.tracking.logs import read_table

__all__ = ["read_scores"]

_STEPS = ("global_step", "step", "iteration")


def read_scores(metric: str) -> tuple[dict[Any, float], str]:
    """Return the scores in ``FILE`` or ``FILE:NAME``, and NAME, which is empty without one.

    Without NAME the file is a JSON object of numbers. With NAME it is a log with that column and
    one of steps; scores are under their steps. Raise an ArgumentError for any other file, and if
    two scores of a step differ.
    """
    path, _, name = metric.rpartition(":")
    if not path or Path(metric).exists():  # a colon may be part of a path
        return _read_json(Path(metric)), ""
    table = read_table(path)
    values = table.column(name)
    column = table.counted_by or next((one for one in _STEPS if one in table.numbers), None)
    if column is None:
        raise ArgumentError(f"{path}: no column of steps; expected one of {', '.join(_STEPS)}")
    steps = dict(zip(*(one.tolist() for one in table.numbers[column]), strict=True))
    scores: dict[Any, float] = {}
    for row, value in zip(values.rows.tolist(), values.values.tolist(), strict=True):
        if row not in steps or not steps[row].is_integer():
            continue
        step = int(steps[row])
        if scores.setdefault(step, value) != value:
            raise ArgumentError(
                f"{path}: {name} is {scores[step]} and {value} at step {step}; leave one of them"
            )
    return scores, name


def _read_json(path: Path) -> dict[Any, float]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or any(isinstance(one, (dict, list)) for one in found.values()):
        raise ArgumentError(
            f"{path}: expected a JSON object that maps checkpoints to numbers; of a log, name the "
            f"metric, as in {path}:eval_loss"
        )
    return found
