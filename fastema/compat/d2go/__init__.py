"""Averages in the checkpoints of D2Go; docs/drop-in.md says how to keep such an average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastema.checkpoint.content import Content
from fastema.checkpoint.layout import Layout, StoredAverage, StoredContents, with_keys

__all__: list[str] = []


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    return StoredContents(state["ema_state"], weights=state.get("model"))


def _write(source: StoredAverage, tensors: Mapping[str, Any], _: Any) -> dict[str, Any]:
    return {"ema_state": tensors}


LAYOUT: Final = Layout("a checkpoint of D2Go", with_keys("ema_state"), _read, write=_write)
