"""For TensorFlow users: ``tf.train.ExponentialMovingAverage`` on compiled kernels."""

from __future__ import annotations

from fastema.tensorflow.average import ExponentialMovingAverage

__all__ = ["ExponentialMovingAverage"]
