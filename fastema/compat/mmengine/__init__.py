"""Averages in the checkpoints of MMEngine; docs/drop-in.md says how to keep such an average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastema.checkpoint.content import Content
from fastema.checkpoint.layout import (
    Layout,
    StoredAverage,
    StoredContents,
    count_of,
    entries_under,
    prefixed,
    with_prefix,
)

__all__: list[str] = []


_PREFIX: Final = "module."


def _find(mapping: Mapping[Any, Any]) -> Mapping[Any, Any] | None:
    average = mapping.get("ema_state_dict")
    if isinstance(average, Mapping):  # beside a model: MMEngine saves the two swapped
        mapping = {**average, _PREFIX: mapping.get("state_dict")}
    return with_prefix(_PREFIX, "steps")(mapping)


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    count, inner = content.whole(state["steps"], "steps"), entries_under(state, _PREFIX)
    model = inner.pop("", None)
    if isinstance(model, Mapping):
        return StoredContents(model, "full", count, None, {"steps": count}, inner)
    return StoredContents(inner, "full", count, None, {"steps": count})


def _write(source: StoredAverage, tensors: Mapping[str, Any], _: Any) -> dict[str, Any]:
    return {"steps": count_of(source), **prefixed(_PREFIX, tensors)}


LAYOUT: Final = Layout(
    "the state of an average of MMEngine", _find, _read, write=_write, counts=True
)
