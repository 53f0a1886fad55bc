"""Find the average in a checkpoint: which library wrote it, and where it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Final

from fastema.checkpoint.content import Content
from fastema.checkpoint.layout import Layout, StoredContents, entries_under
from fastema.checkpoint.source import PROVENANCE, Checkpoint
from fastema.errors import ArgumentError, CheckpointError
from fastema.rules import Power, Schedule
from fastema.shadow.state import PARAMETERS
from fastema.shadow.store import PARTS

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


def _find(mapping: Mapping[Any, Any]) -> tuple[str, Layout, Mapping[Any, Any]] | None:
    """Return the library of a mapping, its layout and the average's state in it, or None."""
    for library, layouts in known_layouts().items():
        for layout in layouts:
            state = layout.find(mapping)
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
        ours = _of_fastema(content, whole, index)
        if ours is not None:
            return ours
        for library, layouts in known_layouts().items():
            for layout in layouts:
                found = layout.read_folder(content) if layout.read_folder else None
                if found is not None:
                    return library, found
    for state in _candidates(content.mapping):
        if state.get("format") == "fastema":
            return "fastema", _of_state(content, state, state, index)
        known = _find(state)
        if known is not None:
            return known[0], known[1].read(content, known[2])
    for name in _AVERAGES:
        inner = content.mapping.get(name)
        if isinstance(inner, Mapping) and content.tensors(inner):
            beside = content.mapping.get("model", content.mapping.get("state_dict"))
            weights = beside if isinstance(beside, Mapping) else None
            return "state dict", StoredContents(inner, weights=weights)
    return "model", None


def _candidates(mapping: Mapping[Any, Any]) -> Iterator[Mapping[Any, Any]]:
    """Yield the mappings in a file that may be the state of an average, or hold one."""
    callbacks = mapping.get("callbacks")  # Lightning, with a callback of fastema
    for one in callbacks.values() if isinstance(callbacks, Mapping) else ():
        inner = one.get("ema") if isinstance(one, Mapping) else None
        if isinstance(inner, Mapping) and "format" in inner:
            yield inner
    yield mapping
    for name in _WITHIN:
        inner = mapping.get(name)
        if isinstance(inner, Mapping):
            yield inner


def explain_foreign_state(state: Mapping[Any, Any]) -> str:
    """Return what the state of another library is and which call reads it; empty if unknown."""
    known = _find(state)
    if known is None:
        return ""
    _, layout, _ = known
    reads = f", which {layout.reads} reads" if layout.reads else ""
    return (
        f"{layout.what}{reads}; fastema.checkpoint.load_into(ema, path) reads a file in this format"
    )


# -- of fastema ------------------------------------------------------------------------------------


def _of_fastema(
    content: Content, whole: Checkpoint, index: int
) -> tuple[str, StoredContents] | None:
    metadata = whole.metadata
    if "state" in metadata:
        try:
            plain = json.loads(metadata["state"])
        except (ValueError, RecursionError):
            plain = None
        if not isinstance(plain, dict):
            raise CheckpointError(f"{whole.path}: its plain values are not a mapping")
        parts = {part: _sets(entries_under(content.mapping, f"{part}.")) for part in PARTS}
        return "fastema", _of_state(content, plain, parts, index)
    if {"gamma", "step", "start", "every"} <= metadata.keys():
        return "fastema.posthoc", _of_snapshot(content, metadata)
    if PROVENANCE in metadata:
        notes = (f"average of finished checkpoints: {metadata[PROVENANCE]}",)
        return "fastema.average", StoredContents(content.mapping, notes=notes)
    return None


def _sets(tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the list of mappings whose tensors are named ``i.name``."""
    found: dict[str, dict[str, Any]] = {}
    for key, one in tensors.items():
        place, _, name = key.partition(".")
        found.setdefault(place, {})[name] = one
    return [found[str(i)] for i in range(len(found)) if str(i) in found]


def _of_state(
    content: Content, plain: Mapping[str, Any], parts: Mapping[str, Any], index: int
) -> StoredContents:
    several, schedule = list(parts.get("shadow") or ()), _parse_schedule(content, plain)
    if len(several) != len(schedule.rules):
        raise CheckpointError(
            f"{content.path} holds {len(several)} averages, and {len(schedule.rules)} schedules"
        )
    if not 0 <= index < len(several):
        raise ArgumentError(f"index={index}: {content.path} holds {len(several)} averages")
    chosen = Schedule(schedule.rules[index], schedule.update_every, schedule.start_after)
    notes = [f"{len(several)} averages; this is number {index}"] if len(several) > 1 else []
    if parts.get("residual"):
        notes.append("the average is split; its halves in 'residual' are not in these tensors")
    if parts.get("ring"):
        notes.append("the windowed mean's latest weights are in 'ring'")
    options = {key: plain[key] for key in ("kind", "rounding", "seed") if key in plain}
    count = content.whole(plain.get("num_updates", 0), "num_updates")
    listed = plain.get(PARAMETERS)
    if listed is not None and not _are_names(listed):
        raise CheckpointError(f"{content.path}: {PARAMETERS!r} is not a list of names")
    state = {**plain, **parts}
    return StoredContents(
        several[index], "full", count, chosen, options, None, tuple(notes), listed, state
    )


def _are_names(found: Any) -> bool:
    return isinstance(found, list | tuple) and all(isinstance(one, str) for one in found)


def _parse_schedule(content: Content, plain: Mapping[str, Any]) -> Schedule:
    try:
        return Schedule.from_dict(plain["schedule"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{content.path}: its schedule is invalid: {error}") from None


def _of_snapshot(content: Content, metadata: Mapping[str, str]) -> StoredContents:
    try:
        step, start, every = (int(metadata[name]) for name in ("step", "start", "every"))
        schedule = Schedule(Power(float(metadata["gamma"])), every, start)
    except (ValueError, ArgumentError) as error:
        raise CheckpointError(f"{content.path} is not a snapshot: {error}") from None
    return StoredContents(content.mapping, "full", step, schedule, {"gamma": metadata["gamma"]})
