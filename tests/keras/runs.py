"""Runs with an average and without, and the callbacks that look on or raise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from fastema.keras import EMAWeights

from .data import DECAY, fit
from .models import Weights, assert_same, model_of, trained, values, weights


class Recorder(keras.callbacks.Callback):
    """The weights at every step of the optimizer: wherever they changed."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.start = weights(self.model)
        self.steps: list[Weights] = []
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        before = self.steps[-1] if self.steps else self.start
        self.batches += 1
        names = trained(self.model)
        if not before or any((now != before[name]).any() for name, now in names.items()):
            self.steps.append(weights(self.model))


class Seen(keras.callbacks.Callback):
    """What there is to see at the hooks of other callbacks: the weights, if nothing else."""

    def __init__(self, look: Callable[[Any], Any] = weights) -> None:
        super().__init__()
        self.look = look
        self.at: dict[str, list[Any]] = {}

    def _note(self, hook: str) -> None:
        self.at.setdefault(hook, []).append(self.look(self.model))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._note("epoch_begin")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._note("epoch_end")

    def on_test_begin(self, logs: Any = None) -> None:
        self._note("test_begin")

    def on_test_end(self, logs: Any = None) -> None:
        self._note("test_end")

    def on_predict_begin(self, logs: Any = None) -> None:
        self._note("predict_begin")


class Raising(keras.callbacks.Callback):
    """Raises an error at some hooks, after so many calls of them."""

    def __init__(self, error: type[BaseException], *hooks: str, after: int = 0) -> None:
        super().__init__()
        self.error, self.left = error, after
        vars(self).update(dict.fromkeys(hooks, self._count))

    def _count(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error("planted")


_recorded: dict[tuple[str, int], Recorder] = {}


def recorded(kind: str = "plain", epochs: int = 2) -> Recorder:
    """A run without any average, of the same model: to be called before ``model_of``."""
    if (kind, epochs) not in _recorded:
        recorder = Recorder()
        fit(model_of(kind), recorder, epochs=epochs)
        assert all(np.isfinite(one.astype(np.float64)).all() for one in recorder.steps[-1].values())
        _recorded[kind, epochs] = recorder
    return _recorded[kind, epochs]


def expected(
    run: Recorder, decay: Callable[[int], float] = lambda n: DECAY, steps: slice = slice(None)
) -> Weights:
    """The recursion in float64; what is not trained is that of the last step."""
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


class Fitted(NamedTuple):
    """A model that was trained with an average, and what both were then."""

    model: Any
    ema: EMAWeights
    raw: Weights
    avg: Weights

    def assert_unchanged(self) -> None:
        assert not self.ema.applied
        assert_same(weights(self.model), self.raw)
        assert_same(average(self.ema), self.avg)


def fitted(kind: str = "plain") -> Fitted:
    """An epoch without validation."""
    model, ema = model_of(kind), EMAWeights(DECAY)
    fit(model, ema, epochs=1, validation_data=None)
    return Fitted(model, ema, weights(model), average(ema))
