"""Race fastema's ``apply`` on TensorFlow variables against ``tf.train``'s.

Both run eagerly and inside ``tf.function``, on the same variables. The variables get new values
before the results are verified.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from bench.race.contest import contest
from bench.race.question import Question, Settings
from bench.race.report import Figure, Row, Rows, number
from fastema.tensorflow import ExponentialMovingAverage

DECAY = 0.875
BYTES = 12  # per element: average and weight read, average written
OURS, THEIRS = "fastema", "tf.train"
CLASSES = {OURS: ExponentialMovingAverage, THEIRS: tf.train.ExponentialMovingAverage}


@dataclass(frozen=True)
class VariableCase:
    """A number of float32 variables of one shape."""

    count: int
    shape: tuple[int, ...]

    @property
    def title(self) -> str:
        """Number and shape, as in titles of tables."""
        return f"{self.count:,} of {' × '.join(f'{n:,}' for n in self.shape)}"

    @property
    def elements(self) -> int:
        """Number of elements of all variables."""
        return self.count * int(np.prod(self.shape))


FULL = [VariableCase(100, (64, 64)), VariableCase(100, (512, 512)), VariableCase(1, (5_000, 5_000))]
QUICK = [VariableCase(100, (64, 64)), VariableCase(20, (512, 512)), VariableCase(1, (2_000, 2_000))]


def _traced(ema: Any, weights: list[Any]) -> Callable[[], object]:
    @tf.function
    def update() -> None:
        ema.apply(weights)

    return update


def _eager(ema: Any, weights: list[Any]) -> Callable[[], object]:
    return lambda: ema.apply(weights)


WAYS = {"eager": _eager, "tf.function": _traced}


def _assert_agreement(
    averages: dict[str, Any], weights: list[Any], jobs: dict[str, Callable[[], object]]
) -> None:
    """Assert that every entry's update agrees with the formula up to rounding."""
    before = {name: [ema.average(w).numpy() for w in weights] for name, ema in averages.items()}
    for weight in weights:
        weight.assign(tf.random.normal(weight.shape))
    for name, job in jobs.items():
        job()
        for old, weight in zip(before[name], weights, strict=True):
            want = old + (1 - DECAY) * (weight.numpy().astype(np.float64) - old)
            error = float(np.abs(averages[name].average(weight).numpy() - want).max())
            assert error <= 4e-6, f"{name}: {error}"


def race(case: VariableCase, quick: bool) -> Iterator[Row]:
    """Verify the entries against the formula and race them, eagerly and in ``tf.function``."""
    weights = [tf.Variable(tf.random.normal(case.shape)) for _ in range(case.count)]
    for way, make in WAYS.items():
        averages: dict[str, Any] = {}
        jobs: dict[str, Callable[[], object]] = {}
        for name, kind in CLASSES.items():
            averages[name] = kind(DECAY)
            averages[name].apply(weights)
            jobs[name] = make(averages[name], weights)
        _assert_agreement(averages, weights, jobs)
        for job in jobs.values():  # preparations end with the second call
            job()
            job()
        yield from contest(
            f"{case.title}, {way}",
            jobs,
            rounds=30 if quick else 200,
            budget_s=2.0 if quick else 20.0,
            n_elements=case.elements,
            bytes_per_element=BYTES,
        )


def rows(settings: Settings) -> Rows:
    """Race all cases."""
    for case in QUICK if settings.quick else FULL:
        yield from race(case, settings.quick)
        gc.collect()


def _threads(settings: Settings) -> dict[str, Any]:
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    return {"tensorflow_threads": threads or "all"}  # 0 means all


METHOD = """\
One `apply` of all variables in float32, all entries in turn, A B C A B C ..., in one process;
medians of the rounds. Before, each entry's update was found equal to the formula. GB/s counts the
least bytes that the work needs, 12 per element; *the limit* is a plain kernel that moves as
many."""

QUESTION = Question(
    "An update of TensorFlow variables",
    METHOD,
    rows,
    packages=("numpy", "numba", "tensorflow-cpu", "tensorflow"),
    figures={"ratio": Figure("time / fastema", number)},
    header=_threads,
)
