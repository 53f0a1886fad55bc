"""``EMAModel`` of diffusers, as its training scripts use it, on fastema's kernels.

Notes
-----
Where it differs:

- Theirs: lists of different lengths are cut to the shorter one; here: an error.
- Theirs: ``store()`` after ``copy_to()`` loses the weights; here: an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fastema.checkpoint.content import Content
from fastema.checkpoint.files import OpenFile
from fastema.checkpoint.layout import (
    Layout,
    StoredAverage,
    StoredContents,
    build_schedule,
    decay_of,
    index_tensors,
    with_keys,
)
from fastema.errors import ArgumentError
from fastema.lazy import lazy_names
from fastema.rules import Constant, Rule, Schedule
from fastema.rules.ema import InverseGamma

if TYPE_CHECKING:
    from fastema.compat.diffusers.classes import EMAModel

__all__ = ["EMAModel"]


_DEFAULTS: Final = {
    **{"decay": 0.9999, "min_decay": 0.0, "update_after_step": 0},
    **{"use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3},
}
"""Schedule options that diffusers saves beside the number of steps, and their defaults."""


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    known = {"optimization_step", *_DEFAULTS}
    options = {name: value for name, value in state.items() if name in known}
    count = content.whole(state["optimization_step"], "optimization_step")
    numbers = {
        name: float(content.number(options.get(name, _DEFAULTS[name]), name))
        for name in ("decay", "min_decay", "inv_gamma", "power")
    }
    start = content.whole(options.get("update_after_step", 0), "update_after_step")
    grows = bool(options.get("use_ema_warmup"))
    schedule = build_schedule(lambda: _rule(numbers, grows, count - start), 1, start)
    averages = index_tensors(content, state["shadow_params"], "shadow_params")
    notes: tuple[str, ...] = ()
    if schedule is None:
        notes = ("its decay still grows as (1 + s) / (10 + s), one step behind fastema's warm-up",)
    return StoredContents(averages, "places", count, schedule, options, None, notes)


def _rule(numbers: Mapping[str, float], grows: bool, step: int) -> Rule:
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


def _read_folder(content: Content) -> StoredContents | None:
    """Read a folder of ``save_pretrained``: the model's files, options in its configuration."""
    config = content.path / "config.json"
    if not config.is_file():
        return None
    try:
        found = json.loads(OpenFile(config).read_whole())
    except (ValueError, RecursionError):
        return None
    if (
        not isinstance(found, dict)
        or not {"optimization_step", "update_after_step"} <= found.keys()
    ):
        return None
    return _read(content, {**found, "shadow_params": content.mapping})._replace(names="full")


def _options(schedule: Schedule | None) -> dict[str, Any] | None:
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


def _write(source: StoredAverage, tensors: Mapping[str, Any], _: Any) -> dict[str, Any]:
    options = _options(source.schedule)
    if options is None:
        known = source.options if source.library == "diffusers" else {}
        decay = known.get("decay", None)
        decay = decay_of(source, "diffusers") if decay is None else decay
        options = {"decay": decay, "min_decay": decay, **known}
    count = {"optimization_step": source.num_updates or 0}
    return {**_DEFAULTS, **options, **count, "shadow_params": list(tensors.values())}


LAYOUT: Final = Layout(
    "the state of diffusers' EMAModel",
    with_keys("optimization_step", "shadow_params"),
    _read,
    "fastema.compat.diffusers.EMAModel.load_state_dict",
    _write,
    stores="places",
    counts=True,
    keeps=lambda schedule: _options(schedule) is not None,
    read_folder=_read_folder,
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, dict.fromkeys(__all__, f"{__name__}.classes"), ModuleNotFoundError
    )
