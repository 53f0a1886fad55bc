"""``ExponentialMovingAverage`` of torch_ema, for a list of parameters, on fastema's kernels.

Notes
-----
Where it differs:

- Theirs: ``load_state_dict`` rounds a float32 average of a bfloat16 model to bfloat16; here: keeps
  the wider dtype.
- Theirs: nested ``average_parameters()`` blocks lose the weights; here: each block restores what it
  found.
- Theirs: ``store()`` after ``copy_to()`` loses the weights; here: an error.
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
    has_warmup,
    index_tensors,
    is_decay_or_warmup,
    with_keys,
)
from fastema.lazy import lazy_names
from fastema.rules import Constant, Warmup

if TYPE_CHECKING:
    from fastema.compat.torch_ema.classes import ExponentialMovingAverage

__all__ = ["ExponentialMovingAverage"]


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    decay, updates = state["decay"], state["num_updates"]
    limit = float(content.number(decay, "decay"))
    count = None if updates is None else content.whole(updates, "num_updates")
    schedule = build_schedule(lambda: Constant(limit) if count is None else Warmup(limit))
    averages = index_tensors(content, state["shadow_params"], "shadow_params")
    options = {"decay": limit, "num_updates": count}
    collected = state.get("collected_params")
    weights = None if not collected else index_tensors(content, collected, "collected_params")
    return StoredContents(averages, "places", count, schedule, options, weights)


def _write(source: StoredAverage, tensors: Mapping[str, Any], _: Any) -> dict[str, Any]:
    return {
        "decay": decay_of(source, "torch_ema"),
        "num_updates": (source.num_updates or 0) if has_warmup(source) else None,
        "shadow_params": list(tensors.values()),
        "collected_params": None,
    }


LAYOUT: Final = Layout(
    "the state of torch_ema's ExponentialMovingAverage",
    with_keys("decay", "num_updates", "shadow_params"),
    _read,
    "fastema.compat.torch_ema.ExponentialMovingAverage.load_state_dict",
    _write,
    stores="places",
    counts=True,
    keeps=is_decay_or_warmup,
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, dict.fromkeys(__all__, f"{__name__}.classes"), ModuleNotFoundError
    )
