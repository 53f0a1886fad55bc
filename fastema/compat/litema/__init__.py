"""``LitEma`` of latent diffusion and Stable Diffusion, and the averages in their checkpoints.

Notes
-----
Where it differs:

- Theirs: never updates an average whose dtype differs from the parameter's; here: updates it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fastema.checkpoint.content import Content
from fastema.checkpoint.layout import (
    Layout,
    StoredAverage,
    StoredContents,
    build_schedule,
    decay_of,
    entries_under,
    has_warmup,
    is_decay_or_warmup,
    scalar,
)
from fastema.errors import CheckpointError
from fastema.lazy import lazy_names
from fastema.rules import Constant, Warmup

if TYPE_CHECKING:
    from fastema.compat.litema.classes import LitEma, ema_weights, with_ema_weights

__all__ = ["LitEma", "ema_weights", "with_ema_weights"]


_PREFIX: Final = "model_ema."
"""Prefix of the average's entries in the state of a Stable Diffusion model."""

_PLAIN: Final = (Mapping, list, str, int, float)
"""Types that are neither a tensor nor stand for one that is not read yet."""


def _find(mapping: Mapping[Any, Any]) -> Mapping[Any, Any] | None:
    model = mapping.get("state_dict", mapping)
    if isinstance(model, Mapping) and f"{_PREFIX}decay" in model:
        averages = entries_under(model, _PREFIX)
        names = {f"{_PREFIX}{name}" for name in averages}
        mapping = {**averages, "": {k: v for k, v in model.items() if k not in names}}
    if "decay" not in mapping or "num_updates" not in mapping:
        return None
    others = {k: v for k, v in mapping.items() if k not in ("decay", "num_updates", "")}
    flat = (
        isinstance(k, str) and "." not in k and not isinstance(v, _PLAIN) for k, v in others.items()
    )
    return mapping if all(flat) else None


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    limit = float(content.number(state["decay"], "decay"))
    updates = content.number(state["num_updates"], "num_updates")
    schedule = build_schedule(lambda: Constant(limit) if updates < 0 else Warmup(limit))
    averages = {k: v for k, v in state.items() if k not in ("decay", "num_updates", "")}
    count = None if updates < 0 else int(updates)
    options = {"decay": limit, "num_updates": int(updates)}
    return StoredContents(averages, "without dots", count, schedule, options, state.get(""))


def _write(source: StoredAverage, tensors: Mapping[str, Any], _: Any) -> dict[str, Any]:
    short = {name.replace(".", ""): one for name, one in tensors.items()}
    if len(short) != len(tensors):
        raise CheckpointError(f"{source.path}: two names are the same without dots")
    taken = {"decay", "num_updates"} & short.keys()
    if taken:
        raise CheckpointError(
            f"{source.path}: {min(taken)!r} is a parameter, and LitEma's own entry; rename it"
        )
    count = (source.num_updates or 0) if has_warmup(source) else -1
    decay = scalar(decay_of(source, "litema"), "float32")
    return {"decay": decay, "num_updates": scalar(count, "int32"), **short}


LAYOUT: Final = Layout(
    "the state of Stable Diffusion's LitEma",
    _find,
    _read,
    "fastema.compat.litema.LitEma.load_state_dict",
    _write,
    stores="parameters",
    counts=True,
    keeps=is_decay_or_warmup,
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, dict.fromkeys(__all__, f"{__name__}.classes"), ModuleNotFoundError
    )
