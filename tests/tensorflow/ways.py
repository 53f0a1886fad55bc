"""Eager and traced calls of an update, and checks of the averages."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from .variables import Rng, move, values

Way = Callable[[Callable[[], object]], Callable[[], object]]


def eagerly(work: Callable[[], object]) -> Callable[[], object]:
    return work


def traced(work: Callable[[], object]) -> Callable[[], object]:
    """Return the work as a ``tf.function`` that later calls do not retrace."""
    traces: list[int] = []

    @tf.function
    def function() -> None:
        traces.append(1)
        assert len(traces) <= 2  # TensorFlow traces twice to create variables
        work()

    return function


def averages(ema: Any, weights: list[Any]) -> list[Any]:
    return [ema.average(weight) for weight in weights]


def assert_equal(got: Any, want: Any) -> None:
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_moves(
    rng: Rng, weights: list[Any], ema: Any, update: Callable[[], object], share: float
) -> None:
    """Assert that an update moves averages by ``share`` of the way to new weights."""
    before = values(averages(ema, weights))
    move(rng, weights)
    update()
    for old, new, got in zip(before, values(weights), averages(ema, weights), strict=True):
        np.testing.assert_allclose(got.numpy(), old + share * (new - old), rtol=0, atol=1e-14)
