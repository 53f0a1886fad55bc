"""The names of ema_pytorch (0.8.3, https://github.com/lucidrains/ema-pytorch), on our kernels.

Their ``EMAModuleWrapper`` is not among them: it takes an :class:`EMA` of here as its ``ema``.

>>> import torch
>>> from fastema.compat.ema_pytorch import EMA
>>> model = torch.nn.Linear(4, 2)
>>> ema = EMA(model, beta=0.999, update_after_step=0, update_every=1)
>>> ema.update()                                   # after every step of the optimizer
>>> ema(torch.zeros(3, 4)).shape                   # the averaged model
torch.Size([3, 2])
"""

from __future__ import annotations

from fastema.compat.ema_pytorch.ema import EMA
from fastema.compat.ema_pytorch.posthoc import KarrasEMA, PostHocEMA
from fastema.compat.ema_pytorch.tree import EMAPytree, EMATensor

__all__ = ["EMA", "EMAPytree", "EMATensor", "KarrasEMA", "PostHocEMA"]
