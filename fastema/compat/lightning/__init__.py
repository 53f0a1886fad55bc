"""Lightning's averaging callbacks: ``lightning.pytorch.callbacks.weight_averaging`` of 2.6.6.

>>> from lightning.pytorch import Trainer                              # doctest: +SKIP
>>> from fastema.compat.lightning import EMAWeightAveraging
>>> trainer = Trainer(callbacks=[EMAWeightAveraging(decay=0.999)])     # doctest: +SKIP

They work with ``lightning`` and ``pytorch_lightning``, whichever is installed, and also with older
versions that have no averaging callbacks.

Notes
-----
Where it differs:

- Theirs: swaps before the first update, so that validation sees untrained weights; here: validates
  the weights in training.
- Theirs: under ``bf16-true`` each validation rounds the float32 average; here: it stays exact.
- Theirs: an exception in validation leaves the average in the model; here: the weights are
  restored.
- Theirs: ``save_weights_only=True`` saves raw weights although the average was monitored; here:
  saves the average.
- Theirs: a checkpoint at the end of training holds the average twice; here: the average and the
  weights in training.
- Theirs: a run that ends without an update resets the model to its initial weights; here: keeps the
  trained weights.
- Theirs: resuming a finished run leaves the weights in training in the model; here: leaves the
  average.
- Theirs: outside of ``fit``, puts the average or the weights of an earlier ``fit`` into the model;
  here: leaves the model alone.
- Theirs: a second ``fit`` continues the step count of the first, and the epoch of the latest update
  is not saved; here: the count restarts, and the epoch is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fastema.checkpoint.content import Content
from fastema.checkpoint.layout import Layout, StoredContents, with_keys
from fastema.lazy import lazy_names

if TYPE_CHECKING:
    from fastema.compat.lightning.classes import EMAWeightAveraging, WeightAveraging

__all__ = ["EMAWeightAveraging", "WeightAveraging"]


def _read(content: Content, state: Mapping[Any, Any]) -> StoredContents:
    counters = state["averaging_state"]
    found = counters.get("n_averaged") if isinstance(counters, Mapping) else None
    count = None if found is None else content.whole(found, "n_averaged")
    options = {} if count is None else {"n_averaged": count}
    weights = state["current_model_state"]
    return StoredContents(state["state_dict"], "full", count, None, options, weights)


LAYOUT: Final = Layout(
    "a checkpoint of Lightning with an average",
    with_keys("averaging_state", "current_model_state", "state_dict"),
    _read,
    "Trainer.fit(ckpt_path=...) with fastema.compat.lightning.WeightAveraging",
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, dict.fromkeys(__all__, f"{__name__}.classes"), ModuleNotFoundError
    )
