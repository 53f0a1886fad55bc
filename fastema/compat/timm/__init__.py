"""``ModelEma``, ``ModelEmaV2`` and ``ModelEmaV3`` of timm (1.0.31), on fastema's kernels.

timm itself is not needed. Its ``CheckpointSaver``, ``load_checkpoint(use_ema=True)`` and
``unwrap_model`` accept these classes like its own.

Notes
-----
Where it differs:

- Theirs: averages tied weights once per name, with weight 0.19 instead of 0.10 at decay 0.9; here:
  averages them once.
- Theirs: ``ModelEma`` and ``ModelEmaV2`` truncate integer buffers; here: copied exactly.
- Theirs: pairs tensors by position; here: by name.
- Theirs: a resumed run draws other bits for stochastic rounding; here: the same bits with
  ``update(model, step=...)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fastema.checkpoint.content import Content
from fastema.checkpoint.layout import (
    Layout,
    StoredAverage,
    StoredContents,
    entries_under,
    with_keys,
    with_prefix,
)
from fastema.lazy import lazy_names

if TYPE_CHECKING:
    from fastema.compat.timm.classes import ModelEma, ModelEmaV2, ModelEmaV3

__all__ = ["ModelEma", "ModelEmaV2", "ModelEmaV3"]


_IN_TRAINING: Final = "state_dict_ema"
"""Entry of the checkpoints of timm's training script that holds the average."""


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    return StoredContents(state[_IN_TRAINING], weights=state.get("state_dict"))


def _write(
    source: StoredAverage, tensors: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, Any]:
    return {**({"state_dict": weights} if weights else {}), _IN_TRAINING: tensors}


LAYOUT: Final = Layout(
    "a checkpoint of timm",
    with_keys(_IN_TRAINING),
    _read,
    "fastema.compat.timm.ModelEma(model, resume=path)",
    _write,
    weights=True,
)


def _read_wrapped(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    notes = ("timm's ModelEmaV3, or any model in a wrapper: their states look alike",)
    return StoredContents(entries_under(state, "module."), notes=notes)


WRAPPED: Final = Layout(
    "a model's state with the names of a wrapper: timm's ModelEmaV2 and ModelEmaV3, or "
    "DataParallel",
    with_prefix("module."),
    _read_wrapped,
    "fastema.compat.timm.ModelEmaV3.load_state_dict",
    weak=True,
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, dict.fromkeys(__all__, f"{__name__}.classes"), ModuleNotFoundError
    )
