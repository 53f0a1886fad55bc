"""Averages in the checkpoints of NeMo; docs/drop-in.md says how to keep such an average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastema.checkpoint.content import Content
from fastema.checkpoint.layout import (
    Layout,
    StoredContents,
    build_schedule,
    index_tensors,
    with_keys,
)
from fastema.rules import Aligned

__all__: list[str] = []


_fits = with_keys("ema", "current_step", "every_n_steps")


def _find(mapping: Mapping[Any, Any]) -> Mapping[Any, Any] | None:
    """Return the state of NeMo's EMAOptimizer, also out of a checkpoint of its trainer."""
    states = mapping.get("optimizer_states")
    inside = states if isinstance(states, list | tuple) else ()
    found = (_fits(one) for one in (*inside, mapping) if isinstance(one, Mapping))
    return next((one for one in found if one is not None), None)


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    count = content.whole(state["current_step"], "current_step")
    every = content.whole(state["every_n_steps"], "every_n_steps")
    options: dict[str, int | float] = {"current_step": count, "every_n_steps": every}
    schedule = None
    if "decay" in state:
        decay = options["decay"] = content.number(state["decay"], "decay")
        schedule = build_schedule(lambda: Aligned(decay ** (1.0 / every), phase=1), every)
    averages = index_tensors(content, state["ema"], "ema")
    return StoredContents(averages, "places", count, schedule, options)


LAYOUT: Final = Layout("a checkpoint of NeMo's EMAOptimizer", _find, _read)
