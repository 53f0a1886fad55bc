"""Tests of fastema.compat.keras on the backend that KERAS_BACKEND names; see test_backends.py."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

from fastema.compat.keras import SwapEMAWeights

from .data import BACKEND, MARKS, XV, YV, X, Y, fit
from .models import Weights, assert_same, differ, renew, state_of, trained, values
from .runs import Raising, Seen

pytestmark = MARKS

State = tuple[Weights, Weights]
"""The weights of a model that are trained, and their averages in its optimizer."""


def new(policy: str = "float32", wrap: Any = None) -> Any:
    keras.utils.set_random_seed(11)
    layers = [
        keras.layers.Dense(6, "relu", name="first", dtype=policy),
        keras.layers.BatchNormalization(name="norm", momentum=0.5, dtype=policy),
        keras.layers.Dense(1, name="last", dtype=policy),
    ]
    model = keras.Sequential([keras.Input((4,)), *layers], name="net")
    optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.8)
    model.compile(wrap(optimizer) if wrap else optimizer, "mse")
    return model


class Made(NamedTuple):
    """A model, and what it was when it was new."""

    model: Any
    optimizer: Any
    state: list[np.ndarray]

    def is_as_made(self) -> bool:
        """Whether it is no more than its state that tests have changed."""
        return self.model.optimizer is self.optimizer and not left_in(self.model)


_free: dict[tuple[str, Any], list[Made]] = {}
_lent: list[tuple[tuple[str, Any], Made]] = []


def build(policy: str = "float32", wrap: Any = None) -> Any:
    """A model as ``new`` makes it, with an optimizer that has its variables."""
    free = _free.setdefault((policy, wrap), [])
    if not free:
        model = new(policy, wrap)
        model.optimizer.build(model.trainable_variables)
        free.append(Made(model, model.optimizer, values(state_of(model))))
    made = free.pop()
    _lent.append(((policy, wrap), made))
    return renew(made.model, made.state)


@pytest.fixture(autouse=True)
def models_are_given_back() -> Iterator[None]:
    yield
    for kind, made in _lent:
        if made.is_as_made():
            _free[kind].append(made)
    _lent.clear()


def optimizer_of(model: Any) -> Any:
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def state(model: Any) -> State:
    raw = trained(model)
    return raw, dict(zip(raw, values(averages_of(model)), strict=True))


def averages_of(model: Any) -> list[Any]:
    return optimizer_of(model)._model_variables_moving_average


def assert_state(found: Any, weights: Weights, averages: Weights) -> None:
    """Equal to the bit, of a model or as it was noted."""
    found = found if isinstance(found, tuple) else state(found)
    assert_same(found[0], weights)
    assert_same(found[1], averages)


def stepped() -> tuple[Any, State]:
    """A model after three steps by hand."""
    model = build()
    for _ in range(3):
        model.train_on_batch(X[:8], Y[:8])
    before = state(model)
    assert differ(*before)
    return model, before


@cache
def reference(epochs: int = 2, policy: str = "float32") -> list[State]:
    """Of the same run without any swap, after each epoch."""
    seen = Seen(state)
    fit(build(policy), seen, epochs=epochs, validation_data=None)
    return seen.at["epoch_end"]


def left_in(model: Any) -> set[str]:
    """What of the callback's is in the objects of the user."""
    return {
        name
        for of in (model, optimizer_of(model))
        for name, value in vars(of).items()
        if type(value).__module__.startswith("fastema")
    }


CALLS: dict[str, Any] = {
    "evaluate": lambda model, *some: model.evaluate(XV, YV, verbose=0, callbacks=[*some]),
    "predict": lambda model, *some: model.predict(XV, verbose=0, callbacks=[*some]),
}


@pytest.mark.parametrize("policy", ["float32", "float16"])
def test_validation_runs_with_the_average_and_every_bit_comes_back(policy: str) -> None:
    want = reference(3, policy=policy)
    model, seen = build(policy), Seen(state)
    fit(model, SwapEMAWeights(), seen, epochs=3)
    for at_test, at_end, (weights, averages) in zip(
        seen.at["test_begin"], seen.at["epoch_end"], want, strict=True
    ):
        assert_state(at_end, weights, averages)  # training took no notice
        assert_state(at_test, averages, weights)  # while the optimizer holds the weights
    assert differ(*want[0])


def test_a_failing_evaluation_gives_the_weights_back() -> None:
    ((weights, averages),) = reference(1)
    model, swap = build(), SwapEMAWeights()
    with pytest.raises(RuntimeError, match="planted"):
        fit(model, swap, Raising(RuntimeError, "on_test_batch_end"))
    # On JAX even a failing fit ends with the average.
    assert_state(model, averages if BACKEND == "jax" else weights, averages)

    model, before = stepped()
    statistics = values(model.non_trainable_variables)

    class Bad(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return (X[:4, :3] if index else X[:4]), Y[:4]  # of another width

    # Each backend has an error of its own.
    with pytest.raises(Exception):  # noqa: B017, PT011
        model.evaluate(Bad(), verbose=0, callbacks=[swap])
    assert_state(model, *before)
    for one, known in zip(values(model.non_trainable_variables), statistics, strict=True):
        assert one.tobytes() == known.tobytes()
    CALLS["evaluate"](model, swap)
    assert_same(trained(model), before[0])


def test_a_saved_model_goes_on(tmp_path: Path) -> None:
    want, model = reference(3), build()

    def save(epoch: int, logs: Any) -> None:
        if epoch == 0:
            model.save(tmp_path / "model.keras")

    saves = keras.callbacks.LambdaCallback(on_epoch_end=save)
    fit(model, saves, SwapEMAWeights(swap_on_epoch=True))
    model, seen = keras.models.load_model(tmp_path / "model.keras"), Seen(state)
    fit(model, SwapEMAWeights(), seen, epochs=3, initial_epoch=1)
    for at_test, known in zip(seen.at["test_begin"], want[1:], strict=True):
        for got, exact in zip(at_test, known[::-1], strict=True):
            assert got.keys() == exact.keys()
            for name, one in got.items():
                np.testing.assert_allclose(one, exact[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ("on_epoch_end", RuntimeError),
        ("on_epoch_end", KeyboardInterrupt),
        ("on_train_batch_end", KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("after", ["predict", "fit", "swapping fit"])
@pytest.mark.parametrize("which", ["same", "fresh", "none"])
def test_a_fit_that_is_cut_short(error: Any, after: str, which: str, hook: str) -> None:
    model, swap = build(), SwapEMAWeights(swap_on_epoch=True)
    with pytest.raises(error, match="planted"):
        fit(model, swap, Raising(error, hook), epochs=3)
    want = reference(1)[0] if hook == "on_epoch_end" else state(model)
    on_epoch = after == "swapping fit"
    some = {"same": [swap], "fresh": [SwapEMAWeights(on_epoch)], "none": []}[which]
    if after in CALLS:
        CALLS[after](model, *some)
        if BACKEND != "jax":  # where even a failing fit ends with the average
            assert_state(model, *want)
    elif BACKEND == "jax":
        if which != "none":  # Keras cannot go on there, see above
            fit(model, *some, epochs=1)
            assert_same(*state(model))
    else:
        start: list[Weights] = []
        note = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: start or start.append(trained(model))
        )
        fit(model, *some, note, epochs=1)
        assert_same(start[0], want[0])
        assert_same(*state(model))
    assert left_in(model) == set() or (BACKEND, which) == ("jax", "none")
