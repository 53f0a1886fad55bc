"""``ModelEMA`` of Ultralytics YOLO, its schedule, and the averages in its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fastema.checkpoint.content import Content
from fastema.checkpoint.layout import Layout, StoredContents, with_keys
from fastema.compat.ultralytics.schedule import Ramp
from fastema.lazy import lazy_names

if TYPE_CHECKING:
    from fastema.compat.ultralytics.classes import ModelEMA, export, load

__all__ = ["ModelEMA", "Ramp", "export", "load"]


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    count = content.whole(state["updates"], "updates")
    return StoredContents(state["ema"], "full", count, None, {"updates": count}, state.get("model"))


LAYOUT: Final = Layout(
    "a checkpoint of Ultralytics",
    with_keys("ema", "updates"),
    _read,
    "fastema.compat.ultralytics.load",
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        dict.fromkeys(("ModelEMA", "export", "load"), f"{__name__}.classes"),
        ModuleNotFoundError,
    )
