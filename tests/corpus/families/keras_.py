"""Keras callbacks on one backend; training writes the hash's values, at a learning rate of 0."""

import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

import fastema
from fastema.compat.keras import SwapEMAWeights
from fastema.keras import EMAWeights, LossAverages

from ..cases import Cases, case
from ..inputs import array, numbers
from ..record import attempt

CASES: Cases = {}
X = numbers("x", 0, (8, 4))
Y = numbers("y", 0, (8, 1))


def _model(policy: str = "float32", **optimizer: Any) -> Any:
    keras.backend.clear_session()
    layers = [
        keras.layers.Dense(6, "relu", name="first", dtype=policy),
        keras.layers.Dense(1, name="last", dtype=policy),
    ]
    model = keras.Sequential([keras.Input((4,)), *layers], name="net")
    model.compile(keras.optimizers.SGD(0.0, **optimizer), "mse")
    _write(model, 0)
    return model


def _write(model: Any, step: int) -> None:
    code = "bf16" if model.layers[0].variable_dtype == "bfloat16" else "f32"
    for one in model.weights:
        one.assign(array(one.path, step, tuple(one.shape), code))


def _read(model: Any) -> dict[str, Any]:
    return {one.path: _array(one) for one in model.weights}


def _array(one: Any) -> Any:
    found = keras.ops.convert_to_numpy(one)
    return np.array(found)


class Training(keras.callbacks.Callback):
    """Write the values of the next step after each batch; record the weights in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.seen = 0, []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.step += 1
        _write(self.model, self.step)

    def on_test_begin(self, logs: Any = None) -> None:
        self.seen.append(_read(self.model))


def _fit(model: Any, *callbacks: Any, epochs: int = 2) -> Any:
    return model.fit(
        X, Y, batch_size=2, epochs=epochs, verbose=0, shuffle=False, validation_data=(X, Y),
        callbacks=[*callbacks],
    )  # fmt: skip


class Seen(keras.callbacks.Callback):
    """Record the weights that validation uses, after the averaging callback has acted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def on_test_begin(self, logs: Any = None) -> None:
        self.seen.append(_read(self.model))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(_read(self.model))


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "float64": {"shadow_dtype": "float64"},
    "bf16+16": {"shadow_dtype": "bf16+16"},
    "bfloat16": {"shadow_dtype": "bfloat16"},
    "every 3": {"update_every": 3, "start_after": 1},
    "two": {"decay": (0.5, 0.9), "which": 1},
    "raw files": {"checkpoints": "raw"},
    "refused": {"checkpoints": "nothing"},
}


@case(CASES, options=OPTIONS)
def ema_weights(options: dict[str, Any]) -> Any:
    callback = attempt(lambda: EMAWeights(**({"decay": 0.9} | options)))
    if isinstance(callback, Exception):
        return {"refused": callback}
    model, training, seen = _model(), Training(), Seen()
    outcome = attempt(lambda: _fit(model, training, callback, seen))
    if isinstance(outcome, Exception):
        return {"refused": outcome}
    found = {"seen": seen.seen, "after": _read(model), "steps": training.step}
    found["updates"] = callback.ema.num_updates
    found["averages"] = [dict(one) for one in callback.ema.shadows]
    with callback.swapped():
        found["inside"] = _read(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "average.weights.h5")
        callback.save_weights(path)
        other = _model()
        other.load_weights(path)
        found["file"] = _read(other)
    return found


@case(CASES, policy=("float32", "bfloat16", "mixed_bfloat16"))
def policies(policy: str) -> Any:
    model, training, callback = _model(policy), Training(), EMAWeights(0.9)
    _fit(model, training, callback)
    return {"averages": dict(callback.ema.shadow), "after": _read(model)}


@case(CASES, epoch=(False, True))
def swap_ema_weights(epoch: bool) -> Any:
    model = _model(use_ema=True, ema_momentum=0.9)
    training, callback, seen = Training(), SwapEMAWeights(swap_on_epoch=epoch), Seen()
    outcome = attempt(lambda: _fit(model, training, callback, seen))
    if isinstance(outcome, Exception):
        return {"refused": outcome}
    return {"seen": seen.seen, "after": _read(model)}


@case(CASES)
def swap_ema_weights_of_another_optimizer() -> Any:
    return {"outcome": attempt(lambda: _fit(_model(), SwapEMAWeights()))}


@case(CASES, rtol=1e-4, options={"default": {}, "window": {"window_size": 3, "decay": None}})
def losses(options: dict[str, Any]) -> Any:
    callback = LossAverages(**options)
    history = _fit(_model(), Training(), callback)
    return {"history": history.history, "own": callback.history, "steps": callback.steps}


@case(CASES, kind=("EMA", "SWA", "SMA"))
def averages_of_models(kind: str) -> Any:
    model = _model()
    options = {"EMA": {"decay": 0.9}, "SWA": {}, "SMA": {"window": 4}}[kind]
    ema = getattr(fastema, kind)(model, **options)
    for step in range(1, 31):
        _write(model, step)
        ema.update()
    found = {"shadow": dict(ema.shadow), "state": ema.state_dict()}
    with ema.swapped():
        found["inside"] = _read(model)
    return found | {"after": _read(model)}
