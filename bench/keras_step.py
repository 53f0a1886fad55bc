"""``python -m bench.keras_step [--quick]``: what an average costs a training step in Keras.

On each backend, in a process of its own: ``fit`` without an average, with Keras' own (``use_ema``
and ``SwapEMAWeights``), and with ``fastema.keras.EMAWeights``; and an ``evaluate`` of one batch
with the average in the model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine, report
from bench.clock import interleave, spread

BACKENDS = {"tensorflow": "TensorFlow", "torch": "PyTorch", "jax": "JAX"}
PACKAGES = ("numpy", "numba", "keras", "torch", "tensorflow-cpu", "tensorflow", "jax")
NONE, OURS, THEIRS = "no average", "fastema.keras.EMAWeights", "use_ema + SwapEMAWeights"
ENTRIES = (NONE, OURS, THEIRS)
DECAY = 0.9
"""Low, so that the check before the race means something. The time does not depend on it."""

BATCH = 32
STEP, EVALUATE = "step", "evaluate"


def small() -> Any:
    """A perceptron of a million weights in 6 tensors."""
    import keras

    dense = keras.layers.Dense
    layers = [dense(800, "relu"), dense(480, "relu"), dense(10)]
    return keras.Sequential([keras.Input((784,)), *layers], name="net")


def large(width: int = 4_096, first: int = 64) -> Any:
    """A convolutional network with batch normalisation; 25 million weights at its full width."""
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


MODELS: dict[str, Callable[[], Any]] = {"MLP": small, "CNN": large}
QUICK: dict[str, Callable[[], Any]] = {"MLP": small, "CNN": partial(large, 512, 16)}


def _clock() -> Any:
    """A callback that times epochs from within: without what fit() does before and after."""
    import keras

    class Clock(keras.callbacks.Callback):  # type: ignore[misc]
        """Has no hook for batches, which would end asynchronous dispatch on JAX."""

        seconds = 0.0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._began = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            for variable in self.model.trainable_variables:  # waits for what is still computed
                if hasattr(variable.value, "block_until_ready"):
                    variable.value.block_until_ready()
            self.seconds = time.perf_counter() - self._began

    return Clock()


class Contestant:
    """One way to train a model; all begin with the same weights and see the same batches."""

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
        self.clock = _clock()
        # Keras' average begins with the weights after the first step.
        self.callbacks: list[Any] = {
            NONE: [],
            OURS: [EMAWeights(DECAY, start_after=1)],
            THEIRS: [keras.callbacks.SwapEMAWeights()],
        }[entry]
        self.entry = entry

    def epoch(self) -> None:
        """Train for one epoch; the clock has its time."""
        callbacks = [*self.callbacks, self.clock]
        options: dict[str, Any] = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
        self.model.fit(self.x, self.y, epochs=1, callbacks=callbacks, **options)
        if self.entry == THEIRS:
            # At the end of fit() Keras gives the weights the arrays of their averages. On JAX the
            # next fit() would donate each of them twice, and fail.
            self.model.set_weights(self.model.get_weights())

    def evaluate(self) -> float:
        """The loss of one batch."""
        x, y = self.x[:BATCH], self.y[:BATCH]
        loss = self.model.evaluate(x, y, verbose=0, batch_size=BATCH, callbacks=self.callbacks)
        return float(loss)

    def average(self) -> list[Any]:
        """The averaged weights, in the order of the model's."""
        import keras

        if self.entry == OURS:
            with self.callbacks[0].swapped():
                return [keras.ops.convert_to_numpy(v).copy() for v in self._weights()]
        return [keras.ops.convert_to_numpy(v).copy() for v in self._weights()]

    def _weights(self) -> list[Any]:
        weights: list[Any] = self.model.trainable_weights
        return weights


def _assert_agreement(contestants: dict[str, Contestant]) -> None:
    """Keras' average is in its model after fit(); ours beside its own must be the same."""
    import numpy as np

    ours, theirs, raw = (contestants[name].average() for name in (OURS, THEIRS, NONE))
    for one, other, weights in zip(ours, theirs, raw, strict=True):
        # The weights themselves differ by the compilers' choices in their last places.
        moved = float(np.abs(weights - other).max())
        error = float(np.abs(one - other).max())
        assert error <= 0.01 * moved + 1e-6, f"the averages differ by {error}, of {moved}"


def race(name: str, quick: bool) -> list[dict[str, Any]]:
    """The rows of a model on this process's backend."""
    import numpy as np

    steps = (20 if name == "MLP" else 3) if quick else (200 if name == "MLP" else 25)
    make = (QUICK if quick else MODELS)[name]
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
    # One round of warming up came first.
    found = {STEP: {entry: times[1:] for entry, times in seconds.items()}}
    jobs = {entry: contestant.evaluate for entry, contestant in contestants.items()}
    found[EVALUATE] = interleave(jobs, 4 * rounds, budget_s=budget / 4)
    weights = contestants[NONE].model.weights
    elements = sum(int(np.prod(one.shape)) for one in weights)
    rows = []
    for question, by_entry in found.items():
        for entry, times in by_entry.items():
            p20, p80 = spread(times)
            rows.append(
                {
                    "model": name,
                    "n_tensors": len(weights),
                    "n_elements": elements,
                    "question": question,
                    "entry": entry,
                    "steps": steps if question == STEP else 1,
                    "rounds": len(times),
                    "median_ms": median(times) * 1e3,
                    "p20_ms": p20 * 1e3,
                    "p80_ms": p80 * 1e3,
                    "added_ms": (median(times) - median(by_entry[NONE])) * 1e3,
                }
            )
    return rows


def measured_apart(module: str, backend: str, quick: bool) -> list[dict[str, Any]]:
    """Measure a backend in its own process: Keras takes one when it is imported, for good."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": backend}
    command = [sys.executable, "-m", module, "--apart"]
    done = subprocess.run(
        command + (["--quick"] if quick else []),
        check=True,
        env={**os.environ, **quiet},
        stdout=subprocess.PIPE,
        text=True,
    )
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return [{"backend": backend, **row} for row in rows]


_METHOD = (
    "Seconds of an epoch, from within, by its steps; epochs of the entries in turn, medians. "
    "*Added* is the difference from the same step without an average. Batches of 32, SGD with "
    "momentum, float32, nothing else in `fit`. *Evaluate* is a call for one batch of 32 with the "
    "average in the model, there and back: Keras' call leaves it in the model after `predict`, and "
    "on TensorFlow changes weights in their last place. On JAX any callback that looks at batches "
    "ends asynchronous dispatch: what that costs is part of what ours adds."
)
_TITLES = {STEP: "A step of training", EVALUATE: "An evaluation of one batch"}


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of a result."""
    rows = {
        (row["question"], row["model"], row["entry"], row["backend"]): row for row in result["rows"]
    }
    backends = [one for one in BACKENDS if any(key[3] == one for key in rows)]
    parts = ["# What an average costs in Keras", report.provenance(result["header"]), _METHOD]
    for question, title in _TITLES.items():
        for model in MODELS:
            first = rows[question, model, NONE, backends[0]]
            sizes = f"{first['n_elements']:,} weights in {first['n_tensors']} tensors"
            head = ["median ms (added)", *(BACKENDS[one] for one in backends)]
            body = []
            for entry in ENTRIES:
                found = [rows[question, model, entry, backend] for backend in backends]
                cells = [
                    report.number(row["median_ms"])
                    + ("" if entry == NONE else f" ({row['added_ms']:+.2f})")
                    for row in found
                ]
                body.append([entry, *cells])
            parts += [f"### {title}: {model}, {sizes}", report.aligned(head, body)]
    return "\n\n".join(parts) + "\n"


def run(
    name: str,
    purpose: str | None,
    measure: Callable[[bool], list[dict[str, Any]]],
    tables: Callable[[dict[str, Any]], str],
) -> int:
    """Answer the command line of a question that is put to each backend, apart from the others."""
    module = "bench." + name.replace("-", "_")
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=purpose)
    parser.add_argument("--quick", action="store_true", help="few steps and rounds")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="only this one")
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="DIR")
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.apart:
        print(json.dumps(measure(options.quick)))
        return 0
    rows = []
    for backend in options.backend or BACKENDS:
        rows += measured_apart(module, backend, options.quick)
    command = f"python -m {module}" + (" --quick" if options.quick else "")
    result = {"header": machine.header(command, name, PACKAGES), "rows": rows}
    text = tables(result)
    print(text)
    report.store(options.out, f"{name}-quick" if options.quick else name, result, text)
    return 0


def races(quick: bool) -> list[dict[str, Any]]:
    """Race the entries on every model, on the backend of this process."""
    return [row for name in MODELS for row in race(name, quick)]


if __name__ == "__main__":
    sys.exit(run("keras-step", __doc__, races, markdown))
