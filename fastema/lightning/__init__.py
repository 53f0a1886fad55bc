"""For Lightning users: callbacks that average weights and losses.

>>> from lightning.pytorch import Trainer                              # doctest: +SKIP
>>> from fastema.lightning import EMACallback, LossAverages
>>> ema, losses = EMACallback(decay=0.999), LossAverages()
>>> trainer = Trainer(callbacks=[ema, losses])                         # doctest: +SKIP

The callbacks work with ``lightning`` and ``pytorch_lightning``, whichever is installed.
"""

from __future__ import annotations

from fastema.lightning.losses import LossAverages
from fastema.lightning.weights import EMACallback

__all__ = ["EMACallback", "LossAverages"]
