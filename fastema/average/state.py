"""Pack an average's state into tensors by name, and check a state on loading.

``shadow.<i>.<name>``, ``residual.<i>.<name>`` and ``ring.<i>.<name>`` are the tensors of the i-th
average; ``fastema`` is the header, JSON in bytes: docs/reference/formats.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np

from fastema.average.foreign import explain_foreign_state
from fastema.average.memory import PARTS, Tensors
from fastema.binding.policies import Rounding
from fastema.bridges.memory import bytes_of, row_major_on_host
from fastema.bridges.names import plain_names
from fastema.bridges.registry import describe, memory_of
from fastema.errors import (
    ArgumentError,
    CheckpointError,
    DeviceError,
    FastemaError,
    format_problems,
)
from fastema.layout.spec import TensorSpec
from fastema.rules import Debiased, Rule, Schedule, Window
from fastema.rules.checks import MAX_STEPS
from fastema.rules.rule import LOG_NEGLIGIBLE, to_plain_value

__all__ = [
    "FINGERPRINT",
    "HEADER",
    "KINDS",
    "LOG_DECAYS",
    "PARAMETERS",
    "Saved",
    "SavedOrMine",
    "check_version",
    "complete_state",
    "fingerprint",
    "join_state",
    "pack",
    "parse_header",
    "part_of_key",
    "select_average",
    "split_state",
    "split_tensors",
    "unpack",
]

SavedOrMine = Literal["saved", "mine"]
"""Schedule to continue with after loading: that of the state, or that of the average."""

HEADER: Final = "fastema"
"""Name of the tensor that holds everything but tensors."""

VERSION: Final = 1

KINDS: Final = ("EMA", "SWA", "SMA", "PowerEMA")
"""Classes whose states there are."""

_KEY: Final = re.compile(rf"({'|'.join(PARTS)})\.(0|[1-9]\d{{0,5}})\.(.*)", re.DOTALL)

_ROOM: Final = 4096
"""Bytes of a header for each average, besides the names of parameters."""


class Saved(NamedTuple):
    """The checked contents of a state dict."""

    counters: dict[str, int]
    schedule: Schedule
    log_decays: tuple[float, ...]
    rounding: Rounding
    tensors: Tensors


COUNTERS: Final = ("num_updates", "num_skipped", "seed")
"""Entries of a header that are whole numbers from 0 to 2**63 - 1."""

PARAMETERS: Final = "parameters"
"""Entry of a header that tells a torch module's parameters from its buffers, and their order."""

FINGERPRINT: Final = "fingerprint"
"""Entry of a header without averages, which lie in tensors of the user's own: their digest."""

LOG_DECAYS: Final = "log_decays"
"""Entry of a header with bias correction: per average, the log of the initial weights' share."""


def pack(
    kind: str,
    counters: Mapping[str, int],
    schedule: Schedule,
    log_decays: Sequence[float],
    rounding: Rounding,
    tensors: Tensors,
    parameters: Sequence[str] | None = None,
    *,
    whole: bool = True,
) -> dict[str, Any]:
    """Return a state dict, which consists of tensors alone.

    ``parameters`` are the names of ``model.parameters()`` in order, if they are known: libraries
    that store an average as a list need them. Unless it is the ``whole`` state, a fingerprint
    takes the place of the averages.
    """
    header: dict[str, Any] = {"version": VERSION, "kind": kind, **counters}
    header |= {"schedule": schedule.to_dict(), "rounding": rounding}
    if parameters is not None:
        header[PARAMETERS] = list(parameters)
    if _is_debiased(schedule):
        header[LOG_DECAYS] = list(log_decays)
    if whole:
        return join_state(header, tensors)
    header[FINGERPRINT] = fingerprint(tensors)
    return {HEADER: join_state(header, tensors)[HEADER]}


def fingerprint(tensors: Tensors) -> str:
    """Return a digest of the names, dtypes, shapes and bits of averages."""
    digest = hashlib.blake2b(digest_size=16)
    for key, one in join_keys(tensors).items():
        array = row_major_on_host(one)
        spec = describe(array)
        digest.update(f"{key} {spec.dtype} {spec.shape}".encode())
        digest.update(bytes_of(array))
    return digest.hexdigest()


def join_keys(tensors: Tensors) -> dict[str, Any]:
    """Return averages under the keys that they have in a state dict."""
    return {
        f"{part}.{i}.{name}": one
        for part, of_part in tensors.items()
        for i, named in enumerate(of_part)
        for name, one in named.items()
    }


def join_state(header: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Return the state dict with this header and these tensors."""
    state = join_keys(tensors)
    text = json.dumps(header).encode()
    # torch.distributed.checkpoint loads in place: the size must not depend on counters and decays.
    names = len(json.dumps(header.get(PARAMETERS)))
    room = _ROOM * max(len(tensors.get("shadow", ())), 1)
    while names + room < len(text):
        room *= 2
    try:
        array = memory_of(next(iter(state.values()))).zeros(names + room, "u8", "cpu")
    except DeviceError:  # CuPy has no memory on the host
        array = np.zeros(names + room, np.uint8)
    bytes_of(array)[:] = text.ljust(names + room)
    return {HEADER: array, **state}


def part_of_key(key: Any) -> tuple[str, int, str] | None:
    """Return the part, the average's index and the tensor's name of a key; None for others."""
    match = _KEY.fullmatch(key) if isinstance(key, str) else None
    return None if match is None else (match[1], int(match[2]), match[3])


def select_average(averages: Mapping[int, Mapping[str, Any]], index: int) -> dict[str, Any]:
    """Return the tensors of an average; those that are only copied are in average 0 alone."""
    return {**averages.get(0, {}), **averages[index]}


def parse_header(text: bytes) -> dict[str, Any]:
    """Return the contents of a header; raise a CheckpointError if they are not a JSON object."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its tensor {HEADER!r} is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"its tensor {HEADER!r} is not a JSON object")
    return header


def split_state(state: Any) -> tuple[dict[str, Any], dict[str, dict[int, dict[str, Any]]]]:
    """Return the header of a state dict, and its tensors by part, average and name.

    Raise a CheckpointError if it is not a state, or has entries that no state has.
    """
    if not isinstance(state, Mapping) or HEADER not in state:
        raise CheckpointError(explain_foreign_state(state))
    try:
        text = bytes(bytes_of(row_major_on_host(state[HEADER])))
    except FastemaError as error:
        raise CheckpointError(f"its entry {HEADER!r} is not a tensor: {error}") from None
    return parse_header(text), split_tensors(state)


def split_tensors(state: Mapping[Any, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return a state's tensors by part, average and name; refuse entries that no state has."""
    parts: dict[str, dict[int, dict[str, Any]]] = {}
    for key, one in state.items():
        found = part_of_key(key)
        if found is not None:
            part, index, name = found
            parts.setdefault(part, {}).setdefault(index, {})[name] = one
        elif key != HEADER:
            raise CheckpointError(f"{key!r} is unexpected: a state has no such entry")
    return parts


def complete_state(state: Any, averages: Tensors | None) -> Any:
    """Return a state with the averages that it left to the user, after checking that they fit.

    ``averages`` are those in the user's own tensors; None if there are none. Raise a
    CheckpointError if the state was saved beside others.
    """
    if not isinstance(state, Mapping) or set(state) != {HEADER}:
        return state
    header, _ = split_state(state)
    if FINGERPRINT not in header:
        return state
    if averages is None:
        raise CheckpointError(
            "the saved state has no averages: state_dict(tensors=False) of an average with into= "
            "left them out; load it into one with into="
        )
    if header[FINGERPRINT] != fingerprint(averages):
        raise CheckpointError(
            "the saved state belongs to other tensors than into= holds: load the target that was "
            "saved with it first"
        )
    return {**state, **join_keys(averages)}


def _is_debiased(schedule: Schedule) -> bool:
    return any(isinstance(rule, Debiased) for rule in schedule.rules)


def _is_equal(found: Any, expected: str | int) -> bool:
    """Return whether type and value are equal."""
    return type(found) is type(expected) and found == expected


def check_version(header: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a header's version and counters."""
    problems = []
    if not _is_equal(header.get("version"), VERSION):
        problems.append(f"version {header.get('version')!r} is not known, only {VERSION}")
    for name in COUNTERS:
        value = header.get(name)
        if type(value) is not int or not 0 <= value <= MAX_STEPS:
            problems.append(f"{name} is {value!r}")
    return problems


def _check_header(header: Mapping[str, Any], kind: str) -> list[str]:
    problems = check_version(header)
    if not _is_equal(header.get("kind"), kind):
        problems.append(f"it was saved by {header.get('kind')!r}, not by {kind!r}")
    if not any(_is_equal(header.get("rounding"), known) for known in get_args(Rounding)):
        problems.append(f"rounding is {header.get('rounding')!r}")
    return problems


def _check_part(found: Mapping[int, Any], part: str, count: int) -> list[str]:
    if count and not found:
        return [f"it has no {part!r}: no tensor's name begins with '{part}.0.'"]
    if found and not count:
        return [
            f"{part!r} is unexpected: build the average with the saved class and shadow_dtype "
            "('bf16+16' has two halves)"
        ]
    if found and max(found) + 1 != count:
        return [f"{part!r} holds {max(found) + 1} averages, expected {count}"]
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
    own: Schedule, header: Mapping[str, Any], log_decays: tuple[float, ...] | None
) -> bool:
    """Return whether an average that has begun would be overwritten under another schedule."""
    saved, count = header["schedule"], header["num_updates"]
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
        A saved state.
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
    header: dict[str, Any] = {}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    problems = []
    try:
        header, found = split_state(state)
    except CheckpointError as error:
        problems.append(str(error))
    else:
        problems += _check_header(header, kind)
        for part in PARTS:
            problems += _check_part(found.get(part, {}), part, len(expected.get(part, ())))
    schedule = None
    log_decays = None
    tensors: Tensors = {}
    if not problems:
        try:
            schedule = _choose_schedule(header.get("schedule"), own, which)
        except ArgumentError as error:
            problems.append(f"schedule: {error}")
        else:
            listed = header.get(LOG_DECAYS)
            log_decays = _check_log_decays(listed, schedule, which)
            if log_decays is None:
                problems.append(
                    f"{LOG_DECAYS} is {listed!r}, expected one number from {LOG_NEGLIGIBLE} to 0 "
                    "per rule if any rule is bias-corrected, otherwise none"
                )
            if len(schedule.rules) != len(own.rules):
                problems.append(f"it has {len(schedule.rules)} averages, not {len(own.rules)}")
            elif which == "mine" and _would_discard(own, header, log_decays):
                problems.append(
                    f"its {header['num_updates']:,} updates are too few for schedule='mine', "
                    f"{own}: the next one would replace the average by the weights"
                )
            elif _windows(schedule) != _windows(own):
                problems.append(f"{schedule.rules} need other rings than {own.rules}")
        for part, of_part in expected.items():
            tensors[part] = []
            for i, specs in enumerate(of_part):
                label = "" if part == "shadow" and len(of_part) == 1 else f" in {part}[{i}]"
                tensors[part].append(_strip_prefixes(found[part].get(i, {}), specs))
                problems += _check_tensors(specs, tensors[part][-1], label)
    if problems or schedule is None or log_decays is None:
        raise CheckpointError("the saved state does not fit:\n" + format_problems(problems))
    counters = {name: header[name] for name in COUNTERS}
    return Saved(counters, schedule, log_decays, header["rounding"], tensors)
