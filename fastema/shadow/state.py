"""Saved averages: what a state dict holds, and whether one fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from fastema.bridges.names import plain_names
from fastema.bridges.registry import describe
from fastema.errors import ArgumentError, CheckpointError, FastemaError, listed
from fastema.layout.spec import TensorSpec
from fastema.rules import Schedule

__all__ = ["Saved", "pack", "unpack"]

FORMAT: Final = "fastema"
VERSION: Final = 1


class Saved(NamedTuple):
    """A state dict's contents, checked."""

    num_updates: int
    schedule: Schedule
    tensors: dict[str, Any]


def pack(
    kind: str, num_updates: int, schedule: Schedule, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """A state dict: strings, numbers and tensors only, so that ``weights_only=True`` loads it."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "num_updates": num_updates,
        "schedule": schedule.to_dict(),
        "shadow": dict(tensors),
    }


def _head(state: Any, kind: str) -> list[str]:
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        return ["it is not a fastema state dict"]
    problems = []
    if state.get("version") != VERSION:
        problems.append(f"version {state.get('version')!r} is not known, only {VERSION}")
    if state.get("kind") != kind:
        problems.append(f"it was saved by {state.get('kind')!r}, not by {kind!r}")
    updates = state.get("num_updates")
    if isinstance(updates, bool) or not isinstance(updates, int) or updates < 0:
        problems.append(f"num_updates is {updates!r}")
    if not isinstance(state.get("shadow"), Mapping):
        problems.append("it has no 'shadow' mapping of names to tensors")
    return problems


def _body(expected: Mapping[str, TensorSpec], tensors: Mapping[str, Any]) -> list[str]:
    problems = [f"{name!r} is missing" for name in expected if name not in tensors]
    problems += [f"{name!r} is unexpected" for name in tensors if name not in expected]
    for name, spec in expected.items():
        if name not in tensors:
            continue
        try:
            found = describe(tensors[name])
        except FastemaError as error:
            problems.append(f"{name!r}: {error}")
            continue
        if found.shape != spec.shape:
            problems.append(f"{name!r} is {list(found.shape)}, expected {list(spec.shape)}")
        if found.dtype != spec.dtype:
            problems.append(
                f"{name!r} is {found.dtype}, expected {spec.dtype} (build the average with the "
                "saved shadow_dtype, or convert it with .to(dtype=...) first)"
            )
    return problems


def _schedule(plain: Any, own: Schedule) -> Schedule:
    # A rule of the user's own cannot be rebuilt from its description, but recognised by it.
    return own if plain == own.to_dict() else Schedule.from_dict(plain)


def unpack(state: Any, kind: str, own: Schedule, expected: Mapping[str, TensorSpec]) -> Saved:
    """A state dict's contents, if every part fits an average with this schedule and tensors.

    Raises
    ------
    CheckpointError
        Listing every mismatch: names, shapes, dtypes, counters, schedule.
    """
    problems = _head(state, kind)
    schedule = tensors = None
    if not problems:
        try:
            schedule = _schedule(state.get("schedule"), own)
        except ArgumentError as error:
            problems.append(f"schedule: {error}")
        names = list(state["shadow"])
        if set(names) != set(expected):
            names = plain_names(names)
        tensors = dict(zip(names, state["shadow"].values(), strict=True))
        problems += _body(expected, tensors)
    if problems or schedule is None or tensors is None:
        raise CheckpointError("the saved state does not fit:\n" + listed(problems))
    return Saved(state["num_updates"], schedule, tensors)
