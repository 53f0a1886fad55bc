"""Averages in the checkpoints of Composer; docs/drop-in.md says how to keep such an average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastema.bridges.names import strip_wrapper_prefixes
from fastema.checkpoint.content import Content
from fastema.checkpoint.layout import Layout, StoredContents, with_keys
from fastema.errors import CheckpointError

__all__: list[str] = []


_fits = with_keys("ema_model")


def _find(mapping: Mapping[Any, Any]) -> Mapping[Any, Any] | None:
    """Return the state of Composer's EMA; out of a checkpoint, with the rest under "state"."""
    state = mapping.get("state", mapping)
    algorithms = state.get("algorithms") if isinstance(state, Mapping) else None
    if isinstance(algorithms, Mapping):
        algorithms = list(algorithms.items())
    for one in algorithms if isinstance(algorithms, list | tuple) else ():
        inner = one[1] if isinstance(one, list | tuple) and len(one) == 2 else None
        if isinstance(inner, Mapping) and _fits(inner):
            return {**inner, "state": state}
    return _fits(mapping)


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
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


LAYOUT: Final = Layout("the state of Composer's EMA", _find, _read)
