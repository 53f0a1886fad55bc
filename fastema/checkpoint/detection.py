"""Find the average in a checkpoint: which library wrote it, and where it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Final

from fastema.average.state import (
    HEADER,
    KINDS,
    LOG_DECAYS,
    PARAMETERS,
    check_version,
    parse_header,
    part_of_key,
    select_average,
    split_tensors,
)
from fastema.checkpoint.content import Content
from fastema.checkpoint.layout import Layout, StoredContents
from fastema.checkpoint.source import PROVENANCE, Checkpoint
from fastema.errors import ArgumentError, CheckpointError
from fastema.rules import Power, Schedule

__all__ = ["detect", "explain_foreign_state", "known_layouts"]


@cache
def known_layouts() -> dict[str, list[Layout]]:
    """Return the layouts of each library: those in the packages of ``fastema.compat``."""
    peers = import_module("fastema.compat")
    names = [one.name for one in iter_modules(peers.__path__) if one.ispkg]
    modules = {name: import_module(f"{peers.__name__}.{name}") for name in names}
    return {
        name: [one for one in vars(module).values() if isinstance(one, Layout)]
        for name, module in modules.items()
    }


def _find(
    mapping: Mapping[Any, Any], *, weak: bool = False
) -> tuple[str, Layout, Mapping[Any, Any]] | None:
    """Return the library of a mapping, its layout and the average's state in it, or None."""
    for library, layouts in known_layouts().items():
        for layout in layouts:
            state = layout.find(mapping) if layout.weak == weak else None
            if state is not None:
                return library, layout, state
    return None


_AVERAGES: Final = ("ema", "ema_state_dict", "model_ema", "ema_model", "ema_weights", "ema_params")
"""Keys under which training scripts save an average next to the model."""

_WITHIN: Final = (*_AVERAGES, "state_dict", "state", "module")
"""Keys that may hold the state of an average."""


def detect(
    content: Content, whole: Checkpoint | None, index: int
) -> tuple[str, StoredContents | None]:
    """Return a file's library and average, or ``("model", None)`` if it holds no average."""
    if whole is not None:
        ours = _of_metadata(content, whole.metadata)
        if ours is not None:
            return ours
        for library, layouts in known_layouts().items():
            for layout in layouts:
                found = layout.read_folder(content) if layout.read_folder else None
                if found is not None:
                    return library, found
    for state in _own_candidates(content.mapping):  # first: others' keys may stand beside it
        if _is_own(state):
            return "fastema", _of_state(content, state, index)
    for state in (content.mapping, *_mappings(content.mapping.get(name) for name in _WITHIN)):
        known = _find(state)
        if known is not None:
            return known[0], known[1].read(content, known[2])
    for name in _AVERAGES:
        inner = content.mapping.get(name)
        if isinstance(inner, Mapping) and content.tensors(inner):
            beside = content.mapping.get("model", content.mapping.get("state_dict"))
            weights = beside if isinstance(beside, Mapping) else None
            return "state dict", StoredContents(inner, weights=weights)
    known = _find(content.mapping, weak=True)
    return ("model", None) if known is None else (known[0], known[1].read(content, known[2]))


def _mappings(values: Iterable[Any]) -> list[Mapping[Any, Any]]:
    return [one for one in values if isinstance(one, Mapping)]


def _own_candidates(mapping: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """Return the mappings in a file that may be a state of fastema."""
    callbacks = mapping.get("callbacks")  # Lightning, with a callback of fastema
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    inside = _mappings(one.get("ema") for one in _mappings(states))
    return [*inside, mapping, *_mappings(mapping.values())]


def _is_own(mapping: Mapping[Any, Any]) -> bool:
    """Return whether a mapping is a state of fastema: a model may have a tensor of that name."""
    header = mapping.get(HEADER)
    return not isinstance(header, Mapping | None) and any(map(part_of_key, mapping))


def explain_foreign_state(state: Mapping[Any, Any]) -> str:
    """Return what the state of another library is and which call reads it; empty if unknown."""
    known = _find(state) or _find(state, weak=True)
    if known is None:
        return ""
    _, layout, _ = known
    reads = f", which {layout.reads} reads" if layout.reads else ""
    return (
        f"{layout.what}{reads}; fastema.checkpoint.load_into(ema, path) reads a file in this format"
    )


# -- of fastema ------------------------------------------------------------------------------------


def _of_metadata(
    content: Content, metadata: Mapping[str, str]
) -> tuple[str, StoredContents] | None:
    """Return what a safetensors file of fastema holds if its metadata says so."""
    if {"gamma", "step", "start", "every"} <= metadata.keys():
        return "fastema.posthoc", _of_snapshot(content, metadata)
    if PROVENANCE in metadata:
        notes = (f"average of finished checkpoints: {metadata[PROVENANCE]}",)
        return "fastema.average", StoredContents(content.mapping, notes=notes)
    return None


def _of_state(content: Content, state: Mapping[Any, Any], index: int) -> StoredContents:
    try:
        header = parse_header(bytes(content.read(HEADER, state[HEADER])))
        parts = split_tensors(state)
    except CheckpointError as error:
        raise CheckpointError(f"{content.path}: {error}") from None
    problems = check_version(header)
    if header.get("kind") not in KINDS:
        problems.append(f"it was saved by {header.get('kind')!r}, not by {', '.join(KINDS)}")
    if problems:
        raise CheckpointError(f"{content.path}: {'; '.join(problems)}")
    schedule = _parse_schedule(content, header)
    several = parts.get("shadow", {})
    if several.keys() != {*range(len(schedule.rules))}:
        raise CheckpointError(
            f"{content.path} holds {len(several)} averages, and {len(schedule.rules)} schedules"
        )
    if index not in several:
        raise ArgumentError(f"index={index}: {content.path} holds {len(several)} averages")
    chosen = Schedule(schedule.rules[index], schedule.update_every, schedule.start_after)
    notes = [f"{len(several)} averages; this is number {index}"] if len(several) > 1 else []
    if "residual" in parts:
        notes.append("the average is split; its halves in 'residual' are not in these tensors")
    if "ring" in parts:
        notes.append("the windowed mean's latest weights are in 'ring'")
    known = ("kind", "rounding", "seed", "num_skipped")
    options: dict[str, Any] = {key: header[key] for key in known if key in header}
    if isinstance(logs := header.get(LOG_DECAYS), list) and len(logs) == len(several):
        options[LOG_DECAYS] = [logs[index]]
    listed = header.get(PARAMETERS)
    if listed is not None and not _are_names(listed):
        raise CheckpointError(f"{content.path}: {PARAMETERS!r} is not a list of names")
    averages, count = select_average(several, index), header["num_updates"]
    return StoredContents(
        averages, "full", count, chosen, options, None, tuple(notes), listed, state
    )


def _are_names(found: Any) -> bool:
    return isinstance(found, list | tuple) and all(isinstance(one, str) for one in found)


def _parse_schedule(content: Content, header: Mapping[str, Any]) -> Schedule:
    try:
        return Schedule.from_dict(header["schedule"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{content.path}: its schedule is invalid: {error}") from None


def _of_snapshot(content: Content, metadata: Mapping[str, str]) -> StoredContents:
    try:
        step, start, every = (int(metadata[name]) for name in ("step", "start", "every"))
        schedule = Schedule(Power(float(metadata["gamma"])), every, start)
    except (ValueError, ArgumentError) as error:
        raise CheckpointError(f"{content.path} is not a snapshot: {error}") from None
    return StoredContents(content.mapping, "full", step, schedule, {"gamma": metadata["gamma"]})
