"""For TensorFlow users: ``tf.train.ExponentialMovingAverage`` on our kernels, in checkpoints."""

from __future__ import annotations

from fastema.tensorflow.average import ExponentialMovingAverage

__all__ = ["ExponentialMovingAverage"]
