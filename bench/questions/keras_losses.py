"""Measure the cost of batch losses and their averages in Keras, and their accuracy.

Each backend runs in its own process. Epochs of ``fit`` are timed without a callback, with
``fastema.keras.LossAverages``, and with a callback that does nothing at the end of each batch. The
accuracy of single batches' losses late in a long epoch is compared with losses derived from the
values that Keras logs.
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

NONE, OURS, IDLE = "no callback", "fastema.keras.LossAverages", "a callback that does nothing"
READ = "fastema.keras.LossAverages, each batch looked at"
ENTRIES = (NONE, OURS, IDLE, READ)


def linear() -> Any:
    """Return the smallest network, whose step computes almost nothing."""
    import keras

    return keras.Sequential([keras.Input((784,)), keras.layers.Dense(10)], name="net")


MODELS: dict[str, Callable[[], Any]] = {"MLP": build_perceptron, "linear": linear}


def _idle() -> Any:
    import keras

    class Idle(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            """Do nothing; the hook's existence ends asynchronous dispatch on JAX."""

    return Idle()


class Race:
    """A model that is trained with different callbacks, from the same state on the same data.

    All entries share one model, because times of two equal models differ by several percent,
    depending on the addresses of their memory.
    """

    def __init__(self, make: Callable[[], Any], steps: int) -> None:
        import keras
        import numpy as np

        from fastema.keras import LossAverages

        keras.utils.set_random_seed(0)
        self.model = make()
        self.model.compile(
            keras.optimizers.SGD(1e-3, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        self.model.optimizer.build(self.model.trainable_variables)
        self.variables = [*self.model.weights, *self.model.optimizer.variables]
        self.first = [np.array(keras.ops.convert_to_numpy(one)) for one in self.variables]
        draw = np.random.default_rng(1)
        self.x = draw.normal(size=(steps * BATCH, 784)).astype(np.float32)
        self.y = draw.integers(0, 10, steps * BATCH)
        self.steps = steps
        self.callbacks = {
            NONE: [],
            OURS: [LossAverages()],
            IDLE: [_idle()],
            READ: [LossAverages(), _idle()],
        }
        self.seconds: dict[str, list[float]] = {entry: [] for entry in ENTRIES}

    def epoch(self, entry: str) -> list[float]:
        """Train for one epoch, record the time per step, and return the loss that Keras logs."""
        for variable, value in zip(self.variables, self.first, strict=True):
            variable.assign(value)
        clock = make_epoch_timer()
        options: dict[str, Any] = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
        callbacks = [*self.callbacks[entry], clock]
        losses: list[float] = self.model.fit(
            self.x, self.y, callbacks=callbacks, **options
        ).history["loss"]
        self.seconds[entry].append(clock.seconds / self.steps)
        return losses


def measure_times(name: str, quick: bool) -> list[dict[str, Any]]:
    """Return the rows of a model's step times on this process's backend."""
    steps = 20 if quick else 200
    race = Race(MODELS[name], steps)
    losses = {entry: race.epoch(entry) for entry in ENTRIES}
    assert losses[OURS] == losses[NONE], f"the losses differ: {losses}"
    rounds, budget = (5, 3.0) if quick else (60, 60.0)
    interleave({n: partial(race.epoch, n) for n in ENTRIES}, rounds, budget_s=budget)
    # Drop the first two rounds: the check and the warm-up.
    seconds = {entry: times[2:] for entry, times in race.seconds.items()}
    rows = []
    for entry, times in seconds.items():
        figures = summarize_times(times, "us")
        if entry != NONE:
            added = median(a - b for a, b in zip(times, seconds[NONE], strict=True))
            figures |= {"added_us": added * 1e6, "added_share": added / median(seconds[NONE])}
        rows.append({"table": f"A step of training: {name}", "entry": entry, "figures": figures})
    return rows


def errors(quick: bool) -> list[dict[str, Any]]:
    """Return rows with the largest relative errors over the last hundredth of a long epoch."""
    import keras
    import numpy as np

    from fastema.keras import LossAverages

    batches, size = (500, 32) if quick else (10_000, 32)
    count = (batches - 1) * size + 20  # the last batch is short
    draw = np.random.default_rng(2)
    x = draw.normal(size=(count, 8)).astype(np.float32)
    y = draw.normal(size=(count, 1)).astype(np.float32)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), "mse")  # keeps weights, so losses are known
    logged: list[float] = []
    totals: list[float] = []

    class Logged(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            logged.append(logs["loss"])
            totals.append(float(self.model.metrics[0].total))

    ours = LossAverages(window_size=None, decay=None)
    options: dict[str, Any] = {"batch_size": size, "shuffle": False, "verbose": 0}
    model.fit(x, y, callbacks=[ours, Logged()], **options)
    kernel, bias = (np.float64(keras.ops.convert_to_numpy(one)) for one in model.weights)
    squares = (x @ kernel + bias - y)[:, 0] ** 2
    truth = np.array([squares[i : i + size].mean() for i in range(0, count, size)])
    seen = np.minimum(np.arange(1, batches + 1) * size, count)
    means, k = np.array(logged), np.arange(batches)
    added = np.diff(seen, prepend=0)
    found = {
        "LossAverages": np.array(ours.history["loss_raw"]),
        "differences of Keras' sums": np.diff(totals, prepend=0.0) / added,
        "differences of Keras' means": np.diff(means * seen, prepend=0.0) / added,
        "(k + 1) m_k - k m_(k-1)": (k + 1) * means - k * np.concatenate([[0.0], means[:-1]]),
    }
    last = slice(-(batches // 100), -1)
    return [
        {
            "table": f"Relative error after {batches:,} batches",
            "entry": how,
            "figures": {
                "late": float(np.abs(raw / truth - 1)[last].max()),
                "short_last_batch": float(abs(raw[-1] / truth[-1] - 1)),
            },
        }
        for how, raw in found.items()
    ]


def measure_all(quick: bool) -> list[dict[str, Any]]:
    """Return the rows of times and errors on this process's backend."""
    return [row for name in MODELS for row in measure_times(name, quick)] + errors(quick)


def rows(settings: Settings) -> Rows:
    """Yield the rows of each backend."""
    return measure_backends(measure_all, settings)


METHOD = """\
Microseconds per step of an epoch, from within; epochs of the entries in turn, medians; *added* is
the median difference from the epoch without a callback in the same round. Batches of 32, 784
features, loss and accuracy, float32. On JAX and PyTorch a callback that looks at batches ends
asynchronous dispatch, which costs more than it saves on a CPU. Where another callback looks at
single batches, `LossAverages` works its averages out for each. Errors are those of the loss of
single batches against float64: the largest in the last hundredth of an epoch, and that of the short
last batch."""

QUESTION = Question(
    "What batch losses cost in Keras",
    METHOD,
    rows,
    backends,
    PACKAGES,
    figures={
        "added_us": Figure("(added,", "({:+.1f},".format),
        "added_share": Figure("share)", "{:+.1%})".format),
        "late": Figure("late,", "{:.0e},".format),
        "short_last_batch": Figure("short last batch", "{:.0e}".format),
    },
)
