"""The names of ema_pytorch (0.8.3, https://github.com/lucidrains/ema-pytorch), on our kernels.

Their ``EMAModuleWrapper`` is not among them: it takes an :class:`EMA` of here as its ``ema``.

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

- Theirs: ``update_every=10``, its default, makes the horizon ten times as long; here: ``decay **
  update_every`` (*).
- Theirs: ``PostHocEMA`` with ``update_every > 1``: asked for a width of 0.05, gives 0.24; here:
  0.05 (*).
- Theirs: synthesis uses snapshots newer than the step, and weights that do not sum to 1; here:
  neither.
- Theirs: integer buffers are never copied; ``exit()`` where a model cannot be copied; here: copied;
  an error.
- Theirs: decays in single precision: at 0.9999 off by 0.02 % in the weight of new values; here:
  double.
- Theirs: ``forward_eval`` is in the mode that the model is in; here: evaluation mode.
- Theirs: a ``lazy_init_ema`` average loads no ``state_dict``; here: loads, deep-copies and pickles.
- Theirs: ``move_ema_to_online_device`` may move either model; here: the average alone.
- Theirs: ``EMAPytree`` averages as many tensors as two trees share; raises for integers; here: an
  error; copied.
- Theirs: snapshots cast ``step`` and ``num_batches_tracked`` to float16, exact up to 2,048; here:
  only floats.
- Theirs: the time of a snapshot is that of the call; here: of the latest update before it.
- Theirs: what is copied or ignored comes from the model as it is now; here: from the latest
  snapshot used.
- Theirs: other files in the folder are an error; a module as ``ema_model`` is shared by all
  averages; here: left alone; copied.
"""

from __future__ import annotations

from fastema.compat.ema_pytorch.ema import EMA
from fastema.compat.ema_pytorch.posthoc import KarrasEMA, PostHocEMA
from fastema.compat.ema_pytorch.tree import EMAPytree, EMATensor

__all__ = ["EMA", "EMAPytree", "EMATensor", "KarrasEMA", "PostHocEMA"]
