"""Saved averages: what a state dict holds, and whether one fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from fastema.bridges.names import plain_names
from fastema.bridges.registry import describe
from fastema.errors import ArgumentError, CheckpointError, FastemaError, listed
from fastema.layout.spec import TensorSpec
from fastema.rules import Rule, Schedule, Window
from fastema.shadow.store import PARTS, Tensors

__all__ = ["Saved", "pack", "unpack"]

FORMAT: Final = "fastema"
VERSION: Final = 1


class Saved(NamedTuple):
    """A state dict's contents, checked."""

    counters: dict[str, int]
    schedule: Schedule
    tensors: Tensors


COUNTERS: Final = ("num_updates", "num_skipped", "seed")
"""Whole numbers of at least 0 that a state holds."""


def pack(
    kind: str, counters: Mapping[str, int], schedule: Schedule, tensors: Tensors
) -> dict[str, Any]:
    """A state dict: strings, numbers and tensors only, so that ``weights_only=True`` loads it."""
    head = {"format": FORMAT, "version": VERSION, "kind": kind}
    return {**head, **counters, "schedule": schedule.to_dict(), **tensors}


def _head(state: Any, kind: str, expected: Tensors) -> list[str]:
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        return ["it is not a fastema state dict"]
    problems = []
    if state.get("version") != VERSION:
        problems.append(f"version {state.get('version')!r} is not known, only {VERSION}")
    if state.get("kind") != kind:
        problems.append(f"it was saved by {state.get('kind')!r}, not by {kind!r}")
    for name in COUNTERS:
        value = state.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            problems.append(f"{name} is {value!r}")
    for part in PARTS:
        problems += _part(state.get(part), part, len(expected.get(part, ())))
    return problems


def _part(found: Any, part: str, count: int) -> list[str]:
    if found is None and not count:
        return []
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        return [f"it has no {part!r}, a list with a mapping of names to tensors for each average"]
    if not count:
        return [f"{part!r} is unexpected: the average is stored in another way"]
    if len(found) != count:
        return [f"{part!r} holds {len(found)} averages, expected {count}"]
    return []


def _body(
    expected: Mapping[str, TensorSpec], tensors: Mapping[str, Any], label: str
) -> Iterator[str]:
    for name in expected:
        if name not in tensors:
            yield f"{name!r} is missing{label}"
    for name in tensors:
        if name not in expected:
            yield f"{name!r} is unexpected{label}"
    for name, spec in expected.items():
        if name not in tensors:
            continue
        try:
            found = describe(tensors[name])
        except FastemaError as error:
            yield f"{name!r}: {error}"
            continue
        if found.shape != spec.shape:
            yield f"{name!r} is {list(found.shape)}, expected {list(spec.shape)}{label}"
        if found.dtype != spec.dtype:
            yield (
                f"{name!r} is {found.dtype}, expected {spec.dtype}{label} (build the average with "
                "the saved shadow_dtype, or convert it with .to(dtype=...) first)"
            )


def _schedule(plain: Any, own: Schedule) -> Schedule:
    # A rule of the user's own cannot be rebuilt from its description, but recognised by it.
    return own if plain == own.to_dict() else Schedule.from_dict(plain)


def _windows(schedule: Schedule) -> list[Rule | None]:
    """The rules that have a ring of their size."""
    return [rule if isinstance(rule, Window) else None for rule in schedule.rules]


def _named(tensors: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by the average's own names: what wrappers put before them does not count."""
    names = list(tensors)
    if set(names) != set(expected):
        names = plain_names(names)
    return dict(zip(names, tensors.values(), strict=True))


def unpack(state: Any, kind: str, own: Schedule, expected: Tensors) -> Saved:
    """A state dict's contents, if every part fits an average with this schedule and tensors.

    Parameters
    ----------
    state : mapping
    kind : str
        The class that it must have been saved by.
    own : Schedule
    expected : Tensors
        Of descriptions.

    Raises
    ------
    CheckpointError
        Listing every mismatch: names, shapes, dtypes, counters, schedule.
    """
    problems = _head(state, kind, expected)
    schedule = None
    tensors: Tensors = {}
    if not problems:
        try:
            schedule = _schedule(state.get("schedule"), own)
        except ArgumentError as error:
            problems.append(f"schedule: {error}")
        else:
            if len(schedule.rules) != len(own.rules):
                problems.append(f"it has {len(schedule.rules)} averages, not {len(own.rules)}")
            elif _windows(schedule) != _windows(own):
                problems.append(f"{schedule.rules} need other rings than {own.rules}")
        for part, of_part in expected.items():
            tensors[part] = []
            for i, specs in enumerate(of_part):
                label = "" if part == "shadow" and len(of_part) == 1 else f" in {part}[{i}]"
                tensors[part].append(_named(state[part][i], specs))
                problems += _body(specs, tensors[part][-1], label)
    if problems or schedule is None:
        raise CheckpointError("the saved state does not fit:\n" + listed(problems))
    return Saved({name: state[name] for name in COUNTERS}, schedule, tensors)
