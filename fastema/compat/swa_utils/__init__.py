"""Classes and functions of :mod:`torch.optim.swa_utils` (PyTorch 2.13), on fastema's kernels.

The functions work in this module's ``AveragedModel`` and in torch's own, and therefore in
Lightning's ``WeightAveraging``:

>>> import torch
>>> from fastema.compat import swa_utils
>>> model = torch.nn.Linear(4, 2)
>>> averaged = torch.optim.swa_utils.AveragedModel(
...     model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.999)
... )
>>> averaged.update_parameters(model)

Notes
-----
Where it differs:

- Theirs: raises for a float32 average of bfloat16 weights; here: averages.
- Theirs: integer buffers with ``use_buffers=True`` keep their first values; here: are copied.
- Theirs: pairs tensors by position, and stops at the shorter list; here: pairs them by name, and
  refuses another model.
- Theirs: waits for the GPU at each step; here: reads the count only after it was loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

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
from fastema.lazy import lazy_names
from fastema.rules import CumulativeMean, Schedule

if TYPE_CHECKING:
    from torch.optim.swa_utils import SWALR

    from fastema.compat.swa_utils.classes import (
        AveragedModel,
        get_ema_avg_fn,
        get_ema_multi_avg_fn,
        get_swa_avg_fn,
        get_swa_multi_avg_fn,
        update_bn,
    )

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    count = content.whole(state["n_averaged"], "n_averaged")
    notes = ("its averaging function is not saved; a mean is assumed",)
    schedule = Schedule(CumulativeMean())
    averages = entries_under(state, "module.")
    return StoredContents(averages, "full", count, schedule, {"n_averaged": count}, None, notes)


def _write(source: StoredAverage, tensors: Mapping[str, Any], _: Any) -> dict[str, Any]:
    return {"n_averaged": count_of(source), **prefixed("module.", tensors)}


LAYOUT: Final = Layout(
    "the state of torch's AveragedModel",
    with_prefix("module.", "n_averaged"),
    _read,
    "fastema.compat.swa_utils.AveragedModel.load_state_dict",
    _write,
    counts=True,
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, dict.fromkeys(__all__, f"{__name__}.classes"), ModuleNotFoundError
    )
