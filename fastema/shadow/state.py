"""Pack an average's state into a dict of plain values and tensors, and check one on loading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

from fastema.binding.policies import Rounding
from fastema.bridges.names import plain_names
from fastema.bridges.registry import describe
from fastema.errors import ArgumentError, CheckpointError, FastemaError, format_problems
from fastema.layout.spec import TensorSpec
from fastema.rules import Debiased, Rule, Schedule, Window
from fastema.rules.rule import LOG_NEGLIGIBLE, to_plain_value
from fastema.shadow.foreign import explain_foreign_state, unflatten_state
from fastema.shadow.store import PARTS, Tensors

__all__ = ["PARAMETERS", "Saved", "SavedOrMine", "pack", "unpack"]

SavedOrMine = Literal["saved", "mine"]
"""Schedule to continue with after loading: that of the state, or that of the average."""

FORMAT: Final = "fastema"
VERSION: Final = 1


class Saved(NamedTuple):
    """The checked contents of a state dict."""

    counters: dict[str, int]
    schedule: Schedule
    log_decays: tuple[float, ...]
    rounding: Rounding
    tensors: Tensors


COUNTERS: Final = ("num_updates", "num_skipped", "seed")
"""Entries of a state that are whole numbers from 0 to 2**63 - 1."""

PARAMETERS: Final = "parameters"
"""Entry of a state that tells a torch module's parameters from its buffers, and their order."""

LOG_DECAYS: Final = "log_decays"
"""Entry of a bias-corrected state: per average, the log of the initial weights' remaining share."""


def pack(
    kind: str,
    counters: Mapping[str, int],
    schedule: Schedule,
    log_decays: Sequence[float],
    rounding: Rounding,
    tensors: Tensors,
    parameters: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return a state dict of strings, numbers and tensors, which ``weights_only=True`` loads.

    ``parameters`` are the names of ``model.parameters()`` in order, if they are known: libraries
    that store an average as a list need them.
    """
    head = {"format": FORMAT, "version": VERSION, "kind": kind}
    debiased = {LOG_DECAYS: list(log_decays)} if _is_debiased(schedule) else {}
    return {
        **head,
        **counters,
        "schedule": schedule.to_dict(),
        "rounding": rounding,
        **({} if parameters is None else {PARAMETERS: list(parameters)}),
        **debiased,
        **tensors,
    }


def _is_debiased(schedule: Schedule) -> bool:
    return any(isinstance(rule, Debiased) for rule in schedule.rules)


def _is_equal(found: Any, expected: str | int) -> bool:
    """Return whether type and value are equal; arrays, whose ``==`` is elementwise, never are."""
    return type(found) is type(expected) and found == expected


def _check_head(state: Any, kind: str, expected: Tensors) -> list[str]:
    if not isinstance(state, Mapping) or not _is_equal(state.get("format"), FORMAT):
        return [explain_foreign_state(state)]
    problems = []
    if not _is_equal(state.get("version"), VERSION):
        problems.append(f"version {state.get('version')!r} is not known, only {VERSION}")
    if not _is_equal(state.get("kind"), kind):
        problems.append(f"it was saved by {state.get('kind')!r}, not by {kind!r}")
    for name in COUNTERS:
        value = state.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            problems.append(f"{name} is {value!r}")
    if not any(_is_equal(state.get("rounding"), known) for known in get_args(Rounding)):
        problems.append(f"rounding is {state.get('rounding')!r}")
    for part in PARTS:
        problems += _check_part(state.get(part), part, len(expected.get(part, ())))
    return problems


def _check_part(found: Any, part: str, count: int) -> list[str]:
    if found is None and not count:
        return []
    if not isinstance(found, list) or not all(
        isinstance(one, Mapping) and all(isinstance(name, str) for name in one) for one in found
    ):
        return [f"it has no {part!r}, a list with a mapping of names to tensors for each average"]
    if not count:
        return [f"{part!r} is unexpected: the average is stored in another way"]
    if len(found) != count:
        return [f"{part!r} holds {len(found)} averages, expected {count}"]
    return []


def _check_tensors(
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
        if found.full_shape != spec.full_shape:
            yield f"{name!r} is {list(found.full_shape)}, expected {list(spec.full_shape)}{label}"
        elif (
            found.division is not None
            and found.division == spec.division
            and (found.shape, found.offset) != (spec.shape, spec.offset)
        ):
            yield (
                f"{name!r} is another rank's part, at {found.offset}, expected the part at "
                f"{spec.offset}{label}; torch.distributed.checkpoint loads each rank's own"
            )
        if found.dtype != spec.dtype:
            yield (
                f"{name!r} is {found.dtype}, expected {spec.dtype}{label} (build the average with "
                "the saved shadow_dtype, or convert it with .to(dtype=...) first)"
            )


def _check_log_decays(
    found: Any, schedule: Schedule, which: SavedOrMine
) -> tuple[float, ...] | None:
    """Return a state's ``log_decays`` for a schedule; None if they do not fit the schedule."""
    if not _is_debiased(schedule):
        return schedule.log_decays(0) if found is None or which == "mine" else None
    if found is None and which == "mine":  # the average already includes its initial weights
        return (LOG_NEGLIGIBLE,) * len(schedule.rules)
    if not isinstance(found, list | tuple) or len(found) != len(schedule.rules):
        return None
    if not all(isinstance(one, float) and LOG_NEGLIGIBLE <= one <= 0.0 for one in found):
        return None
    return tuple(found)


def _choose_schedule(plain: Any, own: Schedule, which: SavedOrMine) -> Schedule:
    # A user-defined rule cannot be rebuilt from its description, but compared with it.
    same = to_plain_value(plain, "it") == own.to_dict()
    if which == "mine" and not same and any(_windows(own)):
        raise ArgumentError(
            "'mine' is not possible for a windowed mean: its ring comes from the state"
        )
    return own if same or which == "mine" else Schedule.from_dict(plain)


def _would_discard(
    own: Schedule, state: Mapping[str, Any], log_decays: tuple[float, ...] | None
) -> bool:
    """Return whether an average that has begun would be overwritten under another schedule."""
    saved, count = state["schedule"], state["num_updates"]
    began = isinstance(saved, Mapping) and count > saved.get("start_after", 0)
    return began and not own.discards(1 << 40) and own.discards(count, log_decays)


def _windows(schedule: Schedule) -> list[Rule | None]:
    """Return the rules with None in place of those that need no ring."""
    return [rule if isinstance(rule, Window) else None for rule in schedule.rules]


def _strip_prefixes(tensors: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors by the average's own names, without the prefixes of wrappers."""
    names = list(tensors)
    if set(names) != set(expected):
        names = plain_names(names)
    return dict(zip(names, tensors.values(), strict=True))


def unpack(
    state: Any, kind: str, own: Schedule, expected: Tensors, which: SavedOrMine = "saved"
) -> Saved:
    """Return a state dict's contents after checking that they fit an average.

    Parameters
    ----------
    state : object
        A saved state, or the tensors of a fastema file.
    kind : str
        Class name of the average.
    own : Schedule
        Schedule of the average.
    expected : Tensors
        Descriptions of the average's tensors.
    which : {"saved", "mine"}
        Schedule to continue with.

    Raises
    ------
    CheckpointError
        Listing every mismatch of names, shapes, dtypes, counters, schedule and class.
    """
    state = unflatten_state(state)
    problems = _check_head(state, kind, expected)
    schedule = None
    log_decays = None
    tensors: Tensors = {}
    if not problems:
        try:
            schedule = _choose_schedule(state.get("schedule"), own, which)
        except ArgumentError as error:
            problems.append(f"schedule: {error}")
        else:
            found = state.get(LOG_DECAYS)
            log_decays = _check_log_decays(found, schedule, which)
            if log_decays is None:
                problems.append(
                    f"{LOG_DECAYS} is {found!r}, expected one number from {LOG_NEGLIGIBLE} to 0 "
                    "per rule if any rule is bias-corrected, otherwise none"
                )
            if len(schedule.rules) != len(own.rules):
                problems.append(f"it has {len(schedule.rules)} averages, not {len(own.rules)}")
            elif which == "mine" and _would_discard(own, state, log_decays):
                problems.append(
                    f"its {state['num_updates']:,} updates are too few for schedule='mine', "
                    f"{own}: the next one would replace the average by the weights"
                )
            elif _windows(schedule) != _windows(own):
                problems.append(f"{schedule.rules} need other rings than {own.rules}")
        for part, of_part in expected.items():
            tensors[part] = []
            for i, specs in enumerate(of_part):
                label = "" if part == "shadow" and len(of_part) == 1 else f" in {part}[{i}]"
                tensors[part].append(_strip_prefixes(state[part][i], specs))
                problems += _check_tensors(specs, tensors[part][-1], label)
    if problems or schedule is None or log_decays is None:
        raise CheckpointError("the saved state does not fit:\n" + format_problems(problems))
    counters = {name: state[name] for name in COUNTERS}
    return Saved(counters, schedule, log_decays, state["rounding"], tensors)
