"""Runs with and without an average, and callbacks that record or raise."""

from collections.abc import Callable
from functools import partialmethod
from typing import Any, NamedTuple

import keras
import numpy as np

from fastema.keras import EMAWeights

from .data import DECAY, fit
from .models import Weights, assert_same, model_of, trained_weights, values, weights


class StepRecorder(keras.callbacks.Callback):
    """Record the weights after each optimizer step, that is whenever they changed."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.start = weights(self.model)
        self.steps: list[Weights] = []
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        before = self.steps[-1] if self.steps else self.start
        self.batches += 1
        names = trained_weights(self.model)
        if not before or any((now != before[name]).any() for name, now in names.items()):
            self.steps.append(weights(self.model))


class HookRecorder(keras.callbacks.Callback):
    """Record what ``look`` sees at each hook: by default the weights."""

    def __init__(self, look: Callable[[Any], Any] = weights) -> None:
        super().__init__()
        self.look = look
        self.at: dict[str, list[Any]] = {}

    def _record(self, hook: str, *_: Any, **__: Any) -> None:
        self.at.setdefault(hook, []).append(self.look(self.model))

    on_epoch_begin = partialmethod(_record, "epoch_begin")
    on_epoch_end = partialmethod(_record, "epoch_end")
    on_test_begin = partialmethod(_record, "test_begin")
    on_test_end = partialmethod(_record, "test_end")
    on_predict_begin = partialmethod(_record, "predict_begin")


class ErrorAt(keras.callbacks.Callback):
    """Raise an error at these hooks, after ``after`` calls."""

    def __init__(self, error: type[BaseException], *hooks: str, after: int = 0) -> None:
        super().__init__()
        self.error, self.left = error, after
        vars(self).update(dict.fromkeys(hooks, self._count))

    def _count(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error("planted")


_runs: dict[tuple[str, int], StepRecorder] = {}


def record_run(kind: str = "plain", epochs: int = 2) -> StepRecorder:
    """Run the same model without an average; call this before ``model_of``."""
    if (kind, epochs) not in _runs:
        recorder = StepRecorder()
        fit(model_of(kind), recorder, epochs=epochs)
        assert all(np.isfinite(one.astype(np.float64)).all() for one in recorder.steps[-1].values())
        _runs[kind, epochs] = recorder
    return _runs[kind, epochs]


def expected_average(
    run: StepRecorder, decay: Callable[[int], float] = lambda n: DECAY, steps: slice = slice(None)
) -> Weights:
    """Average the steps in float64; moving statistics come from the last step."""
    avg = {name: one.astype(np.float64) for name, one in run.start.items()}
    names = [name for name in avg if "moving" not in name]
    taken = run.steps[steps]
    for n, step in enumerate(taken, 1):
        for name in names:
            avg[name] += (1 - decay(n)) * (step[name] - avg[name])
    last = taken[-1]
    return {name: one if name in names else last[name] for name, one in avg.items()}


def average(ema: EMAWeights, which: int = 0) -> Weights:
    found = ema.ema.shadows[which]
    return dict(zip(found, values(found.values()), strict=True))


class FittedModel(NamedTuple):
    """A model trained with an average, and copies of both after training."""

    model: Any
    ema: EMAWeights
    raw: Weights
    avg: Weights

    def assert_unchanged(self) -> None:
        assert not self.ema.applied
        assert_same(weights(self.model), self.raw)
        assert_same(average(self.ema), self.avg)


def fit_model(kind: str = "plain") -> FittedModel:
    """Fit a model for one epoch without validation."""
    model, ema = model_of(kind), EMAWeights(DECAY, checkpoints="raw")
    fit(model, ema, epochs=1, validation_data=None)
    return FittedModel(model, ema, weights(model), average(ema))
