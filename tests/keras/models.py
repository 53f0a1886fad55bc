"""Models that are built once for all cases, and their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from ..support.tolerance import unit_roundoff
from .data import BACKEND

Weights = dict[str, np.ndarray]


def build(
    optimizer: Any = None,
    *,
    policy: str = "float32",
    known: bool = True,
    dropout: float = 0.25,
    **compiled: Any,
) -> Any:
    layers = [
        keras.layers.Dense(6, "relu", name="first", dtype=policy),
        keras.layers.BatchNormalization(name="norm", momentum=0.5, dtype=policy),
        keras.layers.Dropout(dropout, seed=3, name="drop", dtype=policy),
        keras.layers.Dense(1, name="last", dtype=policy),
    ]
    model = keras.Sequential([keras.Input((4,)), *layers] if known else layers, name="net")
    model.compile(optimizer or keras.optimizers.SGD(0.05, momentum=0.5), "mse", **compiled)
    return model


MAKERS: dict[str, Callable[[], Any]] = {
    "plain": build,
    "other": build,
    # Keras does not resume the random numbers of a Dropout.
    "resumable": lambda: build(dropout=0.0),
    "eager": lambda: build(run_eagerly=True),
    "accumulating": lambda: build(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)),
    "several": lambda: build(steps_per_execution=4),
    # The largest scale, which overflows until it has been halved a few times.
    "scaled": lambda: build(
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**127)
    ),
    "bfloat16": lambda: build(policy="bfloat16"),
}
_models: dict[str, tuple[Any, list[np.ndarray]]] = {}


def values(variables: Any) -> list[np.ndarray]:
    """Return copies of variables."""
    return [np.array(keras.ops.convert_to_numpy(one)) for one in variables]


def state_of(model: Any) -> list[Any]:
    return [*model.variables, *model.optimizer.variables]


def reset_model(model: Any, state: list[np.ndarray]) -> Any:
    """Reset a model to its initial state."""
    model._jax_state, model._jax_state_synced = None, True
    model._initial_epoch = 0  # set by BackupAndRestore
    model.stop_training = False
    for variable, value in zip(state_of(model), state, strict=True):
        variable.assign(value)
    for metric in model.metrics:
        metric.reset_state()
    return model


def model_of(kind: str = "plain") -> Any:
    """Return the model of a kind, reset to its initial state."""
    if kind not in _models:
        keras.utils.set_random_seed(11)
        made = MAKERS[kind]()
        made.optimizer.build(made.trainable_variables)
        _models[kind] = made, values(state_of(made))
    model, first = _models[kind]
    vars(model).pop("evaluate", None)
    return reset_model(model, first)


def sync_jax(model: Any) -> Any:
    if BACKEND == "jax":
        model.jax_state_sync()
    return model


def names_of(variables: Any) -> list[str]:
    return [one.path.removeprefix("net/") for one in variables]


def weights(model: Any) -> Weights:
    """Return copies of a model's weights by name."""
    found = sync_jax(model).weights
    return dict(zip(names_of(found), values(found), strict=True))


def set_weights(model: Any, given: Weights) -> None:
    model.set_weights([given[name] for name in names_of(model.weights)])


def trained_weights(model: Any, source: Weights | None = None) -> Weights:
    """Select the trainable entries of a model's weights, or of weights with the same names."""
    source = weights(model) if source is None else source
    return {name: source[name] for name in names_of(model.trainable_weights)}


def read_weights(path: Path) -> Weights:
    other = model_of("other")
    other.load_weights(path)
    return weights(other)


def assert_same(got: Weights, want: Weights) -> None:
    """Assert that weights are bit-identical."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert got[name].tobytes() == want[name].tobytes(), name


def differ(one: Weights, other: Weights) -> bool:
    """Return whether every tensor differs."""
    return all(one[name].tobytes() != other[name].tobytes() for name in one)


def assert_near(got: Weights, want: Weights, roundings: int) -> None:
    for name, exact in want.items():
        bound = roundings * 4 * unit_roundoff("f32") * max(1.0, float(np.abs(exact).max()))
        np.testing.assert_allclose(got[name], exact, rtol=0, atol=bound, err_msg=name)
