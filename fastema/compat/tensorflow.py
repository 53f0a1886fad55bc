"""``tf.train.ExponentialMovingAverage`` on our kernels, which is :mod:`fastema.tensorflow`'s."""

from __future__ import annotations

from fastema.tensorflow import ExponentialMovingAverage

__all__ = ["ExponentialMovingAverage"]
