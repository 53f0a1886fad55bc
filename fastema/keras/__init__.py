"""For Keras users: the average of a model's weights as a callback, on every backend of Keras 3.

>>> import fastema.keras                                               # doctest: +SKIP
>>> ema = fastema.keras.EMAWeights(decay=0.999)                        # doctest: +SKIP
>>> model.fit(x, y, validation_data=held_out, callbacks=[ema])         # doctest: +SKIP
>>> ema.save_weights("average.weights.h5")                             # doctest: +SKIP
"""

from __future__ import annotations

from fastema.keras.weights import EMAWeights

__all__ = ["EMAWeights"]
