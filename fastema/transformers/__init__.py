"""For users of the Hugging Face ``Trainer``: callbacks that average weights and losses.

>>> from transformers import Trainer                                       # doctest: +SKIP
>>> from fastema.transformers import EMACallback, LossAverages
>>> ema = EMACallback(decay=0.999)
>>> trainer = Trainer(model, args, callbacks=[ema], train_dataset=data)    # doctest: +SKIP
>>> LossAverages().attach(trainer)                                         # doctest: +SKIP
>>> trainer.train()                                                        # doctest: +SKIP
"""

from __future__ import annotations

from fastema.transformers.losses import LossAverages
from fastema.transformers.weights import EMACallback

__all__ = ["EMACallback", "LossAverages"]
