"""Drop-in classes for ema_pytorch 0.8.3 (https://github.com/lucidrains/ema-pytorch).

``EMAModuleWrapper`` has no replacement: pass it this module's :class:`EMA` as its ``ema``.

>>> import torch
>>> from fastema.compat.ema_pytorch import EMA
>>> model = torch.nn.Linear(4, 2)
>>> ema = EMA(model, beta=0.999, update_after_step=0, update_every=1)
>>> ema.update()                                   # after every step of the optimizer
>>> ema(torch.zeros(3, 4)).shape                   # the averaged model
torch.Size([3, 2])

Notes
-----
Where it differs:

- Theirs: synthesis uses snapshots newer than the requested step, and coefficients that do not sum
  to 1; here: neither.
- Theirs: integer buffers are never copied; here: copied at each update.
- Theirs: a model that cannot be copied ends the process with ``exit()``; here: raises an error.
- Theirs: decays have single precision: at 0.9999 the weight of new values is off by 0.02 %; here:
  double precision.
- Theirs: ``forward_eval`` runs in the model's current mode; here: in evaluation mode.
- Theirs: an average with ``lazy_init_ema`` loads no ``state_dict``; here: it loads, deep-copies and
  pickles.
- Theirs: ``move_ema_to_online_device`` may move either model; here: moves only the averaged model.
- Theirs: ``EMAPytree`` truncates two trees to the shorter one; here: raises an error.
- Theirs: ``EMAPytree`` raises for integer tensors; here: copies them.
- Theirs: snapshots cast ``step`` and ``num_batches_tracked`` to float16, exact up to 2,048; here:
  only floats are cast.
- Theirs: synthesis dates a snapshot by the call that wrote it; here: by the latest update before
  it.
- Theirs: a synthesized model takes copied and ignored tensors from the current model; here: from
  the latest snapshot used.
- Theirs: other files in the checkpoint folder raise an error; here: are ignored.
- Theirs: a module passed as ``ema_model`` is shared by all averages; here: each average has a copy.
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
    scalar,
    with_keys,
)
from fastema.lazy import lazy_names

if TYPE_CHECKING:
    from fastema.compat.ema_pytorch.ema import EMA
    from fastema.compat.ema_pytorch.posthoc import KarrasEMA, PostHocEMA
    from fastema.compat.ema_pytorch.tree import EMAPytree, EMATensor

__all__ = ["EMA", "EMAPytree", "EMATensor", "KarrasEMA", "PostHocEMA"]


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    count = content.whole(state["step"], "step")
    options = {"initted": bool(content.number(state["initted"], "initted")), "step": count}
    weights = entries_under(state, "online_model.") or None
    averages = entries_under(state, "ema_model.")
    return StoredContents(averages, "full", count, None, options, weights)


def _write(
    source: StoredAverage, tensors: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, Any]:
    begun = bool(source.num_updates) or source.num_updates is None
    counters = {"initted": scalar(begun, "bool"), "step": count_of(source)}
    models = {**prefixed("online_model.", weights), **prefixed("ema_model.", tensors)}
    return {**counters, **models}


LAYOUT: Final = Layout(
    "the state of ema_pytorch's EMA",
    with_keys("initted", "step"),
    _read,
    "fastema.compat.ema_pytorch.EMA.load_state_dict",
    _write,
    counts=True,
    weights=True,
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            **dict.fromkeys(("KarrasEMA", "PostHocEMA"), f"{__name__}.posthoc"),
            **dict.fromkeys(("EMAPytree", "EMATensor"), f"{__name__}.tree"),
            "EMA": f"{__name__}.ema",
        },
        ModuleNotFoundError,
    )
