"""Select the checkpoints to average: in a folder by steps or tokens, or by their scores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from fastema.checkpoint.source import PROVENANCE, Checkpoint, step_of_name
from fastema.checkpoint.stored import open_weights
from fastema.errors import ArgumentError, CheckpointError, format_problems
from fastema.rules.checks import validate_int

__all__ = ["best", "select"]

_ENDINGS: Final = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}

_AnyCheckpoint = TypeVar("_AnyCheckpoint", str, Path, os.PathLike[str], Checkpoint)


def best(
    checkpoints: Sequence[_AnyCheckpoint],
    scores: Mapping[Any, float],
    n: int,
    *,
    mode: Literal["min", "max"],
) -> list[_AnyCheckpoint]:
    """Return the ``n`` checkpoints with the best scores, in their given order.

    Parameters
    ----------
    checkpoints : sequence of paths or of Checkpoint
        Oldest first: of two equal scores, the earlier checkpoint is better.
    scores : mapping of str or int to float
        A number for each checkpoint, under its path, the name of its file or folder, or its step.
        The step is the last number in a name; of a Checkpoint, its ``step``. Entries of other
        checkpoints are ignored.
    n : int
        The number of checkpoints to return, at least 1.
    mode : {"min", "max"}
        Whether the lowest or the highest scores are best.

    Raises
    ------
    ArgumentError
        If a checkpoint has no score, several, or NaN; if an entry fits several checkpoints; if
        there are fewer than ``n`` checkpoints.

    Examples
    --------
    >>> from fastema.checkpoint import best
    >>> paths = ["run/checkpoint-100", "run/checkpoint-200", "run/checkpoint-300"]
    >>> best(paths, {100: 0.61, 200: 0.52, 300: 0.57}, 2, mode="min")
    ['run/checkpoint-200', 'run/checkpoint-300']
    """
    n = validate_int(n, "n", 1)
    if mode not in ("min", "max"):
        raise ArgumentError(f"mode={mode!r}: expected 'min' (lower is better) or 'max'")
    if n > len(checkpoints):
        raise ArgumentError(f"there are {len(checkpoints)} checkpoints to choose the best {n} from")
    values = _scores_of(checkpoints, scores)
    if mode == "max":
        values = [-value for value in values]
    ranked = sorted(range(len(values)), key=values.__getitem__)  # stable
    return [checkpoints[i] for i in sorted(ranked[:n])]


def _scores_of(
    checkpoints: Sequence[str | os.PathLike[str] | Checkpoint], scores: Mapping[Any, float]
) -> list[float]:
    """Return the score of each checkpoint; raise an ArgumentError that names all without one."""
    values: list[float] = []
    owners: dict[Any, Path] = {}
    problems: list[str] = []
    for checkpoint in checkpoints:
        if isinstance(checkpoint, Checkpoint):
            path, step = checkpoint.path, checkpoint.step
        else:
            path, step = Path(checkpoint), step_of_name(Path(checkpoint))
        keys = [key for key in scores if _fits(str(key), path, step)]
        if len(keys) != 1:
            several = f"the scores {', '.join(map(repr, keys))}" if keys else "no score"
            problems.append(f"{path} has {several}")
            continue
        (key,) = keys
        if key in owners:
            problems.append(f"the score {key!r} fits {owners[key]} and {path}: name their paths")
        owners[key] = path
        score = scores[key]
        if isinstance(score, bool) or not isinstance(score, Real) or math.isnan(score):
            problems.append(f"{path} has the score {score!r}")
        else:
            values.append(float(score))
    if problems:
        raise ArgumentError(
            "the best checkpoints cannot be chosen:\n"
            + format_problems(problems)
            + "\nGive one number for each checkpoint, under its path, its file or folder name, or "
            "its step, or leave the checkpoint out."
        )
    return values


def _fits(key: str, path: Path, step: int | None) -> bool:
    """Return whether the key of a score is the path, the name or the step of a checkpoint."""
    if os.path.dirname(key):
        return os.path.abspath(key) == os.path.abspath(path)
    return key == path.name or (key.isdecimal() and int(key) == step)


def select(
    folder: str | os.PathLike[str],
    *,
    last: int | None = None,
    window: int | None = None,
    min_spacing: int = 0,
    unit: Literal["steps", "tokens"] = "steps",
    tokens_per_step: int | None = None,
    key: str | None = None,
) -> list[Checkpoint]:
    """Return the checkpoints in a folder, oldest first, by the step in their metadata or name.

    Parameters
    ----------
    folder : path
        A folder with one file or folder per checkpoint. Results of earlier averaging are ignored.
    last : int, optional
        Return only the ``last`` newest checkpoints. Applied after the other filters.
    window : int, optional
        Return only checkpoints less than ``window`` units older than the newest.
    min_spacing : int
        Minimum number of units between two checkpoints, counted back from the newest. Default 0.
    unit : {"steps", "tokens"}
        Unit of ``window`` and ``min_spacing``. Default "steps".
    tokens_per_step : int, optional
        Training tokens per step. By default the tokens of each checkpoint are the
        ``num_input_tokens_seen`` in its ``trainer_state.json``, which the Hugging Face Trainer
        writes.
    key : str, optional
        Dotted key of the weights in each checkpoint; see :func:`open_checkpoint`.

    Raises
    ------
    CheckpointError
        If the folder holds no checkpoints, one of them cannot be read, a step is unknown or
        occurs twice, or tokens are unknown.
    ArgumentError
        If fewer than ``last`` checkpoints remain, or ``tokens_per_step`` is given for steps.
    """
    if unit not in ("steps", "tokens"):
        raise ArgumentError(f"unit={unit!r}: expected 'steps' or 'tokens'")
    if tokens_per_step is not None and unit == "steps":
        raise ArgumentError(f"tokens_per_step={tokens_per_step}: needs unit='tokens'")
    root = Path(folder)
    try:
        entries = sorted(entry for entry in root.iterdir() if _may_be(entry))
    except OSError as error:
        raise CheckpointError(f"cannot read {root}: {error.strerror or error}") from None
    every = (open_weights(entry, key) for entry in entries)
    found = [one for one in every if PROVENANCE not in one.metadata]
    if not found:
        raise CheckpointError(f"{root} holds no checkpoints")
    unknown = [one.path.name for one in found if one.step is None]
    if unknown:
        raise CheckpointError(
            "the step is not known from the name or the metadata of\n"
            + format_problems(unknown)
            + "\nName the checkpoints one by one, oldest first."
        )
    steps = {one.path.name: one.step or 0 for one in found}
    if len({(one.step, one.metadata.get("gamma")) for one in found}) < len(found):
        raise CheckpointError(
            f"{root}: the steps are not distinct: "
            + ", ".join(f"{name} at {step}" for name, step in list(steps.items())[:4])
            + "; name them one by one, oldest first"
        )
    found.sort(key=lambda one: (steps[one.path.name], one.path.name))
    progress = steps if unit == "steps" else _tokens_of(found, tokens_per_step)
    newest = progress[found[-1].path.name]
    taken: list[Checkpoint] = []
    for one in reversed(found):
        age = newest - progress[one.path.name]
        far = not taken or progress[taken[-1].path.name] - progress[one.path.name] >= min_spacing
        if far and (window is None or age < window):
            taken.append(one)
    if last is not None and len(taken) < last:
        raise ArgumentError(f"last={last}: {len(taken)} checkpoints of {root} qualify")
    return taken[:last][::-1]


def _tokens_of(checkpoints: Sequence[Checkpoint], per_step: int | None) -> dict[str, int]:
    """Return the tokens that each checkpoint, by its name, was trained on."""
    if per_step is not None:
        return {one.path.name: (one.step or 0) * per_step for one in checkpoints}
    tokens = {one.path.name: _recorded_tokens(one.path / _TRAINER_STATE) for one in checkpoints}
    unknown = [name for name, count in tokens.items() if not count]
    if unknown:
        raise CheckpointError(
            f"the tokens are not known, from num_input_tokens_seen in a {_TRAINER_STATE}, of\n"
            + format_problems(unknown)
            + "\nIf each step took the same number of tokens, pass tokens_per_step."
        )
    return tokens


_TRAINER_STATE: Final = "trainer_state.json"


def _recorded_tokens(path: Path) -> int:
    """Return the tokens that the Trainer counted, 0 if it did not."""
    try:
        count = json.loads(path.read_bytes())["num_input_tokens_seen"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 0
    return count if type(count) is int else 0


def _may_be(entry: Path) -> bool:
    """Return whether a file or folder may be a checkpoint by its name; hidden entries are not."""
    if entry.name.startswith("."):
        return False
    if entry.is_dir():
        return any(one.suffix in _ENDINGS or one.name == ".metadata" for one in entry.iterdir())
    return entry.suffix in _ENDINGS
