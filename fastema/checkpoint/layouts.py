"""Layouts in which libraries save averages: how to recognize and read each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from fastema.bridges.names import strip_wrapper_prefixes
from fastema.checkpoint.content import Content
from fastema.checkpoint.files import OpenFile
from fastema.checkpoint.source import PROVENANCE, Checkpoint
from fastema.errors import ArgumentError, CheckpointError
from fastema.rules import Aligned, Constant, CumulativeMean, Power, Rule, Schedule, Warmup
from fastema.rules.ema import InverseGamma
from fastema.shadow.foreign import library_of
from fastema.shadow.state import PARAMETERS
from fastema.shadow.store import PARTS

__all__ = ["Names", "StoredContents", "candidates", "diffusers_options", "read"]

Names = Literal["full", "without dots", "places"]
"""How tensors are named: as in the model, as in the model without dots, or by list position."""

_LONGEST_CONFIG: Final = 1 << 24


class StoredContents(NamedTuple):
    """The contents of a layout: mappings of names to tensors that are not read yet."""

    averages: Mapping[Any, Any]
    names: Names = "full"
    num_updates: int | None = None
    schedule: Schedule | None = None
    options: Mapping[str, Any] = {}
    weights: Mapping[Any, Any] | None = None
    notes: tuple[str, ...] = ()
    parameters: list[str] | None = None
    state: Mapping[str, Any] | None = None


# -- who wrote it ----------------------------------------------------------------------------------

_AVERAGES: Final = ("ema", "ema_state_dict", "model_ema", "ema_model", "ema_weights", "ema_params")
"""Keys under which training scripts save an average next to the model."""

_WITHIN: Final = (*_AVERAGES, "state_dict", "state", "module")
"""Keys that may hold the state of an average."""

_MODULE: Final = "module."
"""Prefix of the entries of an averaged model."""

_LITEMA: Final = "model_ema."
"""Prefix of the entries of Stable Diffusion's average."""


def read(
    content: Content, whole: Checkpoint | None, index: int
) -> tuple[str, StoredContents | None]:
    """Return a file's library and average, or ``("model", None)`` if it holds no average."""
    if whole is not None:
        ours = _of_fastema(content, whole, index)
        if ours is not None:
            return ours
        counters = _config_of(whole.path)
        if counters is not None:
            return "diffusers", _of_diffusers(
                content, {**counters, "shadow_params": content.mapping}, "full"
            )
    for state in candidates(content.mapping):
        if state.get("format") == "fastema":
            return "fastema", _of_state(content, state, state, index)
        library = library_of(state)
        if library in _READERS:
            return library, _READERS[library](content, state)
    for name in _AVERAGES:
        inner = content.mapping.get(name)
        if isinstance(inner, Mapping) and content.tensors(inner):
            beside = content.mapping.get("model", content.mapping.get("state_dict"))
            weights = beside if isinstance(beside, Mapping) else None
            return "state dict", StoredContents(inner, weights=weights)
    return "model", None


def candidates(mapping: Mapping[Any, Any]) -> Iterator[Mapping[Any, Any]]:
    """Yield the mappings in a file that may be the state of an average."""
    state = mapping.get("state", mapping)
    algorithms = state.get("algorithms") if isinstance(state, Mapping) else None
    if isinstance(algorithms, Mapping):  # Composer; its model may hold the average
        algorithms = list(algorithms.items())
    for one in algorithms if isinstance(algorithms, list | tuple) else ():
        if isinstance(one, list | tuple) and len(one) == 2 and _has(one[1], "ema_model"):
            yield {**one[1], "state": state}
    states = mapping.get("optimizer_states")
    if isinstance(states, list | tuple):  # NeMo
        yield from (one for one in states if _has(one, "ema"))
    if isinstance(mapping.get("ema_state_dict"), Mapping):  # MMEngine, which swaps the two
        yield {**mapping["ema_state_dict"], _MODULE: mapping.get("state_dict")}
    model = mapping.get("state_dict", mapping)
    if isinstance(model, Mapping) and f"{_LITEMA}decay" in model:
        averages = {k.removeprefix(_LITEMA): v for k, v in model.items() if _begins(k, _LITEMA)}
        yield {**averages, "": {k: v for k, v in model.items() if not _begins(k, _LITEMA)}}
    callbacks = mapping.get("callbacks")  # Lightning, with a callback of fastema
    for one in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(one, Mapping) and _has(one.get("ema"), "format"):
            yield one["ema"]
    yield mapping
    for name in _WITHIN:
        inner = mapping.get(name)
        if isinstance(inner, Mapping) and (_has(inner, "format") or library_of(inner)):
            yield inner


def _has(found: Any, name: str) -> bool:
    return isinstance(found, Mapping) and name in found


def _only(mapping: Mapping[Any, Any], *names: str) -> dict[str, Any]:
    return {name: mapping[name] for name in names if name in mapping}


def _begins(name: Any, prefix: str) -> bool:
    return isinstance(name, str) and name.startswith(prefix)


def _under(mapping: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    """Return the entries whose names begin with a prefix, with the prefix removed."""
    return {k.removeprefix(prefix): v for k, v in mapping.items() if _begins(k, prefix)}


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
        parts = {part: _sets(_under(content.mapping, f"{part}.")) for part in PARTS}
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


# -- of others -------------------------------------------------------------------------------------


def _build_schedule(rule: Callable[[], Rule], every: int = 1, start: int = 0) -> Schedule | None:
    """Return a schedule, or None if a saved number is out of range."""
    try:
        return Schedule(rule(), every, start)
    except (ArgumentError, ZeroDivisionError, OverflowError):
        return None


def _index_tensors(content: Content, found: Any, name: str) -> dict[str, Any]:
    """Return the tensors of a list by position, as strings.

    A mapping is returned unchanged: a safetensors file already names its tensors by position.
    """
    if isinstance(found, Mapping):
        return dict(found)
    if not isinstance(found, list | tuple):
        raise CheckpointError(f"{content.path}: {name!r} is not a list of tensors")
    return {str(i): one for i, one in enumerate(found)}


def _of_torch_ema(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    decay, updates = state["decay"], state["num_updates"]
    limit = float(content.number(decay, "decay"))
    count = None if updates is None else content.whole(updates, "num_updates")
    schedule = _build_schedule(lambda: Constant(limit) if count is None else Warmup(limit))
    averages = _index_tensors(content, state["shadow_params"], "shadow_params")
    options = {"decay": limit, "num_updates": count}
    collected = state.get("collected_params")
    weights = None if not collected else _index_tensors(content, collected, "collected_params")
    return StoredContents(averages, "places", count, schedule, options, weights)


_DIFFUSERS: Final = (
    *("decay", "min_decay", "optimization_step", "update_after_step"),
    *("use_ema_warmup", "inv_gamma", "power"),
)
"""Schedule options that diffusers saves."""


def _of_diffusers(
    content: Content, state: Mapping[Any, Any], names: Names = "places"
) -> StoredContents:
    options = _only(state, *_DIFFUSERS)
    count = content.whole(state["optimization_step"], "optimization_step")
    numbers = {
        name: float(content.number(options.get(name, usual), name))
        for name, usual in (
            ("decay", 0.9999),
            ("min_decay", 0.0),
            ("inv_gamma", 1.0),
            ("power", 2 / 3),
        )
    }
    start = content.whole(options.get("update_after_step", 0), "update_after_step")
    grows = bool(options.get("use_ema_warmup"))
    schedule = _build_schedule(lambda: _diffusers_rule(numbers, grows, count - start), 1, start)
    averages = _index_tensors(content, state["shadow_params"], "shadow_params")
    notes: tuple[str, ...] = ()
    if schedule is None:
        notes = ("its decay still grows as (1 + s) / (10 + s), one step behind fastema's warm-up",)
    return StoredContents(averages, names, count, schedule, options, None, notes)


def diffusers_options(schedule: Schedule | None) -> dict[str, Any] | None:
    """Return diffusers' options for a schedule, or None if diffusers cannot express it."""
    if schedule is None or schedule.update_every > 1:
        return None
    rule, start = schedule.rules[0], {"update_after_step": schedule.start_after}
    if isinstance(rule, Constant):
        return {"decay": rule.value, "min_decay": rule.value, **start}
    if isinstance(rule, InverseGamma):
        limits = {"decay": rule.limit, "min_decay": rule.minimum, "use_ema_warmup": True}
        return {**limits, "inv_gamma": rule.inv_gamma, "power": rule.power, **start}
    return None


def _diffusers_rule(numbers: Mapping[str, float], grows: bool, step: int) -> Rule:
    """Return the rule for further updates; raise an ArgumentError if no rule matches."""
    decay, least = numbers["decay"], numbers["min_decay"]
    growing = max(step - 1, 0)
    if least == decay and step > 1:
        return Constant(decay)
    if grows:
        return InverseGamma(decay, numbers["inv_gamma"], numbers["power"], least)
    if step > 1 and (1 + growing) / (10 + growing) >= decay:
        return Constant(decay)  # the decay has reached its limit
    raise ArgumentError("no rule has a decay one step behind that of a warm-up")


def _of_lightning(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    counters = state["averaging_state"]
    found = counters.get("n_averaged") if isinstance(counters, Mapping) else None
    count = None if found is None else content.whole(found, "n_averaged")
    options = {} if count is None else {"n_averaged": count}
    weights = state["current_model_state"]
    return StoredContents(state["state_dict"], "full", count, None, options, weights)


def _of_ema_pytorch(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    count = content.whole(state["step"], "step")
    options = {"initted": bool(content.number(state["initted"], "initted")), "step": count}
    weights = _under(state, "online_model.") or None
    return StoredContents(_under(state, "ema_model."), "full", count, None, options, weights)


def _of_swa_utils(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    count = content.whole(state["n_averaged"], "n_averaged")
    notes = ("its averaging function is not saved; a mean is assumed",)
    schedule = Schedule(CumulativeMean())
    averages = _under(state, _MODULE)
    return StoredContents(averages, "full", count, schedule, {"n_averaged": count}, None, notes)


def _of_mmengine(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    count, inner = content.whole(state["steps"], "steps"), _under(state, _MODULE)
    model = inner.pop("", None)  # MMEngine saves the average and the model swapped
    if isinstance(model, Mapping):
        return StoredContents(model, "full", count, None, {"steps": count}, inner)
    return StoredContents(inner, "full", count, None, {"steps": count})


def _of_timm(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    if "state_dict_ema" in state:
        return StoredContents(state["state_dict_ema"], weights=state.get("state_dict"))
    notes = ("timm's ModelEmaV3, or any model in a wrapper: their states look alike",)
    return StoredContents(_under(state, _MODULE), notes=notes)


def _of_nemo(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    count = content.whole(state["current_step"], "current_step")
    every = content.whole(state["every_n_steps"], "every_n_steps")
    options: dict[str, int | float] = {"current_step": count, "every_n_steps": every}
    schedule = None
    if "decay" in state:
        decay = options["decay"] = content.number(state["decay"], "decay")
        schedule = _build_schedule(lambda: Aligned(decay ** (1.0 / every), phase=1), every)
    averages = _index_tensors(content, state["ema"], "ema")
    return StoredContents(averages, "places", count, schedule, options)


def _of_ultralytics(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    count = content.whole(state["updates"], "updates")
    return StoredContents(state["ema"], "full", count, None, {"updates": count}, state.get("model"))


def _of_composer(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    averages, whole, listed = state["ema_model"], state.get("state", {}), None
    if not isinstance(averages, Mapping):
        raise CheckpointError(f"{content.path}: it was saved before its average began")
    parts = [averages.get(f"named_{kind}_dict") for kind in ("parameters", "buffers")]
    if all(isinstance(one, Mapping) for one in parts):
        averages = {name: one for part in parts for name, one in part.items()}  # type: ignore[union-attr]
        listed = list(parts[0])  # type: ignore[arg-type]
    weights = whole.get("model")
    if "training_model" in state:  # an old state, which holds the average and the weights
        weights = None
    elif state.get("ema_weights_active"):  # the average and the weights are swapped
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"{content.path}: the average is in the model, which is missing")
        averages, weights = strip_wrapper_prefixes(averages), strip_wrapper_prefixes(weights)
        averages, weights = {name: weights[name] for name in averages if name in weights}, averages
    stamp = whole.get("timestamp")
    inner = stamp.get("Timestamp", {}) if isinstance(stamp, Mapping) else {}
    count = content.whole(inner["batch"], "batch") if "batch" in inner else None
    return StoredContents(averages, "full", count, None, {}, weights, (), listed)


def _of_d2go(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    return StoredContents(state["ema_state"], weights=state.get("model"))


def _of_litema(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    limit = float(content.number(state["decay"], "decay"))
    updates = content.number(state["num_updates"], "num_updates")
    schedule = _build_schedule(lambda: Constant(limit) if updates < 0 else Warmup(limit))
    averages = {k: v for k, v in state.items() if k not in ("decay", "num_updates", "")}
    count = None if updates < 0 else int(updates)
    options = {"decay": limit, "num_updates": int(updates)}
    return StoredContents(averages, "without dots", count, schedule, options, state.get(""))


_READERS: Final[dict[str, Callable[[Content, Mapping[Any, Any]], StoredContents]]] = {
    "composer": _of_composer,
    "d2go": _of_d2go,
    "diffusers": _of_diffusers,
    "ema_pytorch": _of_ema_pytorch,
    "lightning": _of_lightning,
    "litema": _of_litema,
    "mmengine": _of_mmengine,
    "nemo": _of_nemo,
    "swa_utils": _of_swa_utils,
    "timm": _of_timm,
    "torch_ema": _of_torch_ema,
    "ultralytics": _of_ultralytics,
}
"""Library to the function that reads its layout."""


def _config_of(path: Path) -> dict[str, Any] | None:
    """Return the schedule options in a diffusers folder's configuration, or None."""
    if not (path / "config.json").is_file():
        return None
    try:
        found = json.loads(OpenFile(path / "config.json").read_whole(_LONGEST_CONFIG))
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and {"optimization_step", "update_after_step"} <= found.keys():
        return _only(found, *_DIFFUSERS)
    return None
