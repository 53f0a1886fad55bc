"""Summarize a run in a few numbers and one sentence, for the report and the picture."""

from __future__ import annotations

import math
import statistics
from dataclasses import astuple, dataclass
from itertools import chain

from fastema.cli.demo.train import Evaluation, History, Times

LEVEL = 0.05  # error rates that differ by less than this, relatively, count as equal


@dataclass(frozen=True)
class Level:
    """The mean and standard deviation of a quantity over the last part of a run."""

    mean: float
    std: float


@dataclass(frozen=True)
class Tail:
    """Statistics over all evaluations in the last third of a run."""

    epochs: int
    raw_loss: Level
    ema_loss: Level
    raw_accuracy: Level  # percent
    ema_accuracy: Level  # percent

    @property
    def finite(self) -> bool:
        """Whether both the raw and the averaged loss are finite."""
        return math.isfinite(self.raw_loss.mean) and math.isfinite(self.ema_loss.mean)


def tail(history: History) -> Tail:
    """Return statistics of the last third of a run, at least of its last epoch."""
    epochs = max(1, len(history.times) // 3)
    first = len(history.times) - epochs
    last = [seen for seen in history.evaluations if seen.epoch > first]
    return Tail(
        epochs,
        raw_loss=_level([seen.raw.loss for seen in last]),
        ema_loss=_level([seen.ema.loss for seen in last]),
        raw_accuracy=_level([seen.raw.accuracy for seen in last]),
        ema_accuracy=_level([seen.ema.accuracy for seen in last]),
    )


def describe_outcome(seen: Tail) -> str:
    """Return the outcome of the run in one sentence."""
    if not seen.finite:
        return "The training diverged: its loss is no longer finite"
    raw_errors = 100.0 - seen.raw_accuracy.mean
    ema_errors = 100.0 - seen.ema_accuracy.mean
    if math.isclose(raw_errors, ema_errors, rel_tol=LEVEL):
        return "Raw and averaged weights do equally well in this run"
    if ema_errors < raw_errors:
        removed = 100.0 * (1.0 - ema_errors / raw_errors)
        return f"Averaging the weights removes {removed:.0f} % of the test errors"
    return (
        "The average has not caught up with the raw weights: "
        f"{100.0 - ema_errors:.1f} % against {100.0 - raw_errors:.1f} % correct"
    )


def best(evaluations: list[Evaluation]) -> tuple[float, float]:
    """Return the highest raw and the highest averaged accuracy of all evaluations, in percent."""
    scores = [(seen.raw.accuracy, seen.ema.accuracy) for seen in evaluations]
    raw, ema = map(max, zip(*scores, strict=True))
    return raw, ema


def cost(history: History) -> Times:
    """Return the times of all epochs, concatenated."""
    columns = zip(*map(astuple, history.times), strict=True)
    return Times(*(list(chain.from_iterable(column)) for column in columns))


def _level(values: list[float]) -> Level:
    if not all(map(math.isfinite, values)):
        return Level(math.nan, math.nan)
    return Level(statistics.fmean(values), statistics.pstdev(values))
