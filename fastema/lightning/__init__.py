"""For Lightning users: averages of weights, and of losses, as callbacks.

>>> from lightning.pytorch import Trainer                              # doctest: +SKIP
>>> from fastema.lightning import EMACallback, LossAverages
>>> ema, losses = EMACallback(decay=0.999), LossAverages()
>>> trainer = Trainer(callbacks=[ema, losses])                         # doctest: +SKIP

They are callbacks of ``lightning`` and of ``pytorch_lightning``, of whichever is installed.
"""

from __future__ import annotations

from fastema.lightning.losses import LossAverages
from fastema.lightning.weights import EMACallback

__all__ = ["EMACallback", "LossAverages"]
