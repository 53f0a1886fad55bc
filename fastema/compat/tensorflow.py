"""``tf.train.ExponentialMovingAverage`` on fastema's kernels, from :mod:`fastema.tensorflow`."""

from __future__ import annotations

from fastema.tensorflow import ExponentialMovingAverage

__all__ = ["ExponentialMovingAverage"]
