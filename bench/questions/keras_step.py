"""Measure the cost of an average for a training step and an evaluation in Keras.

Each backend runs in its own process: ``fit`` without an average, with Keras' average (``use_ema``
and ``SwapEMAWeights``), and with ``fastema.keras.EMAWeights``; and ``evaluate`` on one batch with
the average in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from bench.race.durations import summarize_times
from bench.race.keras_processes import (
    BATCH,
    PACKAGES,
    backends,
    build_perceptron,
    make_epoch_timer,
    measure_backends,
)
from bench.race.question import Question, Settings
from bench.race.report import Figure, Rows
from fastema.cli.clock import interleave

NONE, OURS, THEIRS = "no average", "fastema.keras.EMAWeights", "use_ema + SwapEMAWeights"
ENTRIES = (NONE, OURS, THEIRS)
DECAY = 0.9
"""Low, so that the check before the race is meaningful. Times do not depend on it."""


def build_cnn(width: int = 4_096, first: int = 64) -> Any:
    """Return a convolutional network with batch norms; 25 million weights at full width."""
    import keras

    layers: list[Any] = [keras.Input((16, 16, 3))]
    for channels in (first, 2 * first, 4 * first):
        layers += [
            keras.layers.Conv2D(channels, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
        ]
    layers += [
        keras.layers.Flatten(),
        keras.layers.Dense(width, "relu"),
        keras.layers.Dense(width, "relu"),
        keras.layers.Dense(896, "relu"),
        keras.layers.Dense(10),
    ]
    return keras.Sequential(layers, name="net")


FULL: dict[str, Callable[[], Any]] = {"MLP": build_perceptron, "CNN": build_cnn}
QUICK: dict[str, Callable[[], Any]] = {"MLP": build_perceptron, "CNN": partial(build_cnn, 512, 16)}


class Contestant:
    """A model trained in one way; all start with the same weights and see the same batches."""

    def __init__(self, entry: str, make: Callable[[], Any], steps: int) -> None:
        import keras
        import numpy as np

        from fastema.keras import EMAWeights

        keras.utils.set_random_seed(0)
        self.model = make()
        theirs = {"use_ema": True, "ema_momentum": DECAY} if entry == THEIRS else {}
        self.model.compile(
            keras.optimizers.SGD(1e-3, momentum=0.9, **theirs),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        draw = np.random.default_rng(1)
        size = (steps * BATCH, *self.model.input_shape[1:])
        self.x = draw.normal(size=size).astype(np.float32)
        self.y = draw.integers(0, 10, steps * BATCH)
        self.clock = make_epoch_timer()
        # Keras' average starts from the weights after the first step.
        self.callbacks: list[Any] = {
            NONE: [],
            OURS: [EMAWeights(DECAY, start_after=1)],
            THEIRS: [keras.callbacks.SwapEMAWeights()],
        }[entry]
        self.entry = entry

    def epoch(self) -> None:
        """Train for one epoch, timed by ``self.clock``."""
        callbacks = [*self.callbacks, self.clock]
        options: dict[str, Any] = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
        self.model.fit(self.x, self.y, epochs=1, callbacks=callbacks, **options)
        if self.entry == THEIRS:
            # At the end of fit() Keras assigns the averages' arrays to the weights. On JAX the next
            # fit() would donate each array twice and fail.
            self.model.set_weights(self.model.get_weights())

    def evaluate(self) -> float:
        """Return the loss of one batch."""
        x, y = self.x[:BATCH], self.y[:BATCH]
        loss = self.model.evaluate(x, y, verbose=0, batch_size=BATCH, callbacks=self.callbacks)
        return float(loss)

    def average(self) -> list[Any]:
        """Return the averaged trainable weights, in the order of the model's weights."""
        import keras

        if self.entry == OURS:
            with self.callbacks[0].swapped():
                return [keras.ops.convert_to_numpy(v).copy() for v in self._weights()]
        return [keras.ops.convert_to_numpy(v).copy() for v in self._weights()]

    def _weights(self) -> list[Any]:
        weights: list[Any] = self.model.trainable_weights
        return weights


def _assert_agreement(contestants: dict[str, Contestant]) -> None:
    """Assert that our average agrees with Keras', which is in its model after fit()."""
    import numpy as np

    ours, theirs, raw = (contestants[name].average() for name in (OURS, THEIRS, NONE))
    for one, other, weights in zip(ours, theirs, raw, strict=True):
        # The weights themselves differ in their last bits, since models are compiled separately.
        moved = float(np.abs(weights - other).max())
        error = float(np.abs(one - other).max())
        assert error <= 0.01 * moved + 1e-6, f"the averages differ by {error}, of {moved}"


def race(name: str, quick: bool) -> list[dict[str, Any]]:
    """Race the entries on a model, on this process's backend, and return the rows."""
    import numpy as np

    steps = (20 if name == "MLP" else 3) if quick else (200 if name == "MLP" else 25)
    make = (QUICK if quick else FULL)[name]
    contestants = {entry: Contestant(entry, make, steps) for entry in ENTRIES}
    for contestant in contestants.values():
        contestant.epoch()
    _assert_agreement(contestants)
    rounds, budget = (3, 4.0) if quick else (15, 120.0)
    seconds: dict[str, list[float]] = {entry: [] for entry in ENTRIES}

    def timed(contestant: Contestant) -> None:
        contestant.epoch()
        seconds[contestant.entry].append(contestant.clock.seconds / steps)

    interleave({n: partial(timed, c) for n, c in contestants.items()}, rounds, budget_s=budget)
    # Drop the warm-up round.
    found = {"A step of training": {entry: times[1:] for entry, times in seconds.items()}}
    jobs = {entry: contestant.evaluate for entry, contestant in contestants.items()}
    found["An evaluation of one batch"] = interleave(jobs, 4 * rounds, budget_s=budget / 4)
    weights = contestants[NONE].model.weights
    size = {
        "n_elements": sum(int(np.prod(one.shape)) for one in weights),
        "n_tensors": len(weights),
    }
    rows = []
    for title, by_entry in found.items():
        for entry, times in by_entry.items():
            figures = {**size, **summarize_times(times)}
            if entry != NONE:
                figures["added_ms"] = (median(times) - median(by_entry[NONE])) * 1e3
            rows.append({"table": f"{title}: {name}", "entry": entry, "figures": figures})
    return rows


def races(quick: bool) -> list[dict[str, Any]]:
    """Race the entries on every model, on this process's backend, and return the rows."""
    return [row for name in FULL for row in race(name, quick)]


def rows(settings: Settings) -> Rows:
    """Yield the rows of each backend."""
    return measure_backends(races, settings)


METHOD = """\
Seconds of an epoch, from within, by its steps; epochs of the entries in turn, medians. *Added* is
the difference from the same step without an average. Batches of 32, SGD with momentum, float32,
nothing else in `fit`. *Evaluate* is a call for one batch of 32 with the average in the model, there
and back: Keras' call leaves it in the model after `predict`, and on TensorFlow changes weights in
their last place. On JAX any callback that looks at batches ends asynchronous dispatch: what that
costs is part of what ours adds."""

QUESTION = Question(
    "What an average costs in Keras",
    METHOD,
    rows,
    backends,
    PACKAGES,
    figures={
        "added_ms": Figure("(added)", "({:+.2f})".format),
    },
)
