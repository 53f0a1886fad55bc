"""fastema.compat.tensorflow: an alias of our TensorFlow class."""

import numpy as np
import pytest
import tensorflow as tf

from fastema.compat.tensorflow import ExponentialMovingAverage

pytestmark = pytest.mark.tensorflow


def test_alias_is_our_class_and_matches_tensorflow() -> None:
    import fastema.tensorflow

    assert ExponentialMovingAverage is fastema.tensorflow.ExponentialMovingAverage
    draw = np.random.default_rng(0)
    variable = tf.Variable(draw.normal(size=(5, 3)), dtype=tf.float32)
    ours, theirs = (
        kind(0.9, num_updates=4)
        for kind in (ExponentialMovingAverage, tf.train.ExponentialMovingAverage)
    )
    for _ in range(6):
        ours.apply([variable])
        theirs.apply([variable])
        variable.assign(draw.normal(size=(5, 3)))
    got, want = ours.average(variable).numpy(), theirs.average(variable).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.abs(got - variable.numpy()).min() > 0
