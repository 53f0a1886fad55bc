"""For Keras users: callbacks that average weights and losses, on every backend of Keras 3.

>>> import fastema.keras                                               # doctest: +SKIP
>>> ema = fastema.keras.EMAWeights(decay=0.999)                        # doctest: +SKIP
>>> model.fit(x, y, validation_data=held_out, callbacks=[ema])         # doctest: +SKIP
>>> ema.save_weights("average.weights.h5")                             # doctest: +SKIP

The loss that Keras logs is the mean since the epoch began. :class:`LossAverages` adds the loss of
each batch and its moving averages.

>>> losses = fastema.keras.LossAverages(window_size=20, decay=0.9)     # doctest: +SKIP
>>> model.fit(x, y, callbacks=[losses, keras.callbacks.TensorBoard()]) # doctest: +SKIP
"""

from __future__ import annotations

from fastema.keras.losses import LossAverages
from fastema.keras.weights import EMAWeights

__all__ = ["EMAWeights", "LossAverages"]
