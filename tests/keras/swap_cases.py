"""Tests of fastema.compat.keras on the backend that KERAS_BACKEND names; see test_keras.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

from fastema.compat.keras import SwapEMAWeights
from fastema.errors import ArgumentError, StateError

from .backends import on_one_backend

BACKEND = keras.backend.backend()
Weights = list[np.ndarray]

pytestmark = [
    # What Keras does with TensorFlow, PyTorch and its own files.
    pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
]

_draw = np.random.default_rng(5)
X = _draw.normal(size=(24, 4)).astype(np.float32)
Y = np.sin(X.sum(1, keepdims=True))
XV, YV = X[::3] + np.float32(0.1), Y[::3]


def new(policy: str = "float32", wrap: Any = None) -> Any:
    keras.utils.set_random_seed(11)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, "relu", name="first", dtype=policy),
            keras.layers.BatchNormalization(name="norm", momentum=0.5, dtype=policy),
            keras.layers.Dense(1, name="last", dtype=policy),
        ],
        name="net",
    )
    optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.8)
    model.compile(wrap(optimizer) if wrap else optimizer, "mse")
    return model


# -- models, made once: what they are compiled to is kept, their state is not ----------------------


class Made(NamedTuple):
    """A model, and what it was when it was new."""

    model: Any
    optimizer: Any
    state: Weights

    def is_as_made(self) -> bool:
        """Whether it is no more than its state that tests have changed."""
        return self.model.optimizer is self.optimizer and not left_in(self.model)

    def renewed(self) -> Any:
        model = self.model
        model._jax_state, model._jax_state_synced = None, True
        model.stop_training = False
        for variable, value in zip(_state(model), self.state, strict=True):
            variable.assign(value)
        for metric in model.metrics:
            metric.reset_state()
        return model


_free: dict[tuple[str, Any], list[Made]] = {}
_lent: list[tuple[tuple[str, Any], Made]] = []


def _state(model: Any) -> list[Any]:
    return [*model.variables, *model.optimizer.variables]


def build(policy: str = "float32", wrap: Any = None) -> Any:
    """A model as ``new`` makes it, with an optimizer that has its variables."""
    free = _free.setdefault((policy, wrap), [])
    if not free:
        model = new(policy, wrap)
        model.optimizer.build(model.trainable_variables)
        free.append(Made(model, model.optimizer, values(_state(model))))
    made = free.pop()
    _lent.append(((policy, wrap), made))
    return made.renewed()


@pytest.fixture(autouse=True)
def models_are_given_back() -> Iterator[None]:
    yield
    for kind, made in _lent:
        if made.is_as_made():
            _free[kind].append(made)
    _lent.clear()


def values(variables: Any) -> Weights:
    return [np.array(keras.ops.convert_to_numpy(one)) for one in variables]


def optimizer_of(model: Any) -> Any:
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def raw(model: Any) -> Weights:
    if BACKEND == "jax":
        model.jax_state_sync()
    return values(model.trainable_variables)


def averages(model: Any) -> Weights:
    return values(optimizer_of(model)._model_variables_moving_average)


def fit(model: Any, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    options = {"validation_data": (XV, YV), **options}
    return model.fit(
        X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=[*callbacks],
        **options,
    )  # fmt: skip


def assert_same(got: Weights, want: Weights) -> None:
    assert [one.tobytes() for one in got] == [one.tobytes() for one in want]


def assert_differ(one: Weights, other: Weights) -> None:
    assert all(a.tobytes() != b.tobytes() for a, b in zip(one, other, strict=True))


class Seen(keras.callbacks.Callback):
    """Weights and averages at the hooks of other callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[str, list[tuple[Weights, Weights]]] = {}

    def _note(self, hook: str) -> None:
        found = raw(self.model), averages(self.model)
        self.at.setdefault(hook, []).append(found)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch:
            self._note("epoch_begin")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._note("epoch_end")

    def on_test_begin(self, logs: Any = None) -> None:
        self._note("test_begin")

    def on_predict_begin(self, logs: Any = None) -> None:
        self._note("predict_begin")


class Undisturbed(Seen):
    """The same run without any swap: what weights and averages are after each epoch."""


@cache
def reference(epochs: int = 2, policy: str = "float32") -> list[tuple[Weights, Weights]]:
    seen = Undisturbed()
    fit(build(policy), seen, epochs=epochs, validation_data=None)
    return seen.at["epoch_end"]


def test_validation_runs_with_the_average_and_every_bit_comes_back() -> None:
    for policy in ("float32", "float16"):
        want = reference(3, policy=policy)
        model, seen = build(policy), Seen()
        fit(model, SwapEMAWeights(), seen, epochs=3)
        for (weights, average), at_test, at_end, known in zip(
            seen.at["test_begin"], seen.at["test_begin"], seen.at["epoch_end"], want, strict=True
        ):
            assert_same(at_end[0], known[0])  # training took no notice
            assert_same(at_end[1], known[1])
            assert_same(weights, known[1])
            assert_same(average, known[0])  # while the optimizer holds the weights
            assert at_test[0] is weights
        assert_differ(*want[0])


def test_the_loss_is_that_of_the_average() -> None:
    model, swap = build(), SwapEMAWeights()
    history = fit(model, swap, epochs=1).history
    # At the end of fit Keras puts the average into the model.
    assert_same(raw(model), averages(model))
    assert model.evaluate(XV, YV, batch_size=4, verbose=0) == pytest.approx(
        history["val_loss"][0], rel=1e-6
    )


def test_evaluate_and_predict_by_hand() -> None:
    model, swap, seen = build(), SwapEMAWeights(), Seen()
    for _ in range(3):
        model.train_on_batch(X[:8], Y[:8])
    before = raw(model), averages(model)
    assert_differ(*before)
    model.evaluate(XV, YV, verbose=0, callbacks=[swap, seen])
    first = model.predict(XV, verbose=0, callbacks=[swap, seen])
    again = model.predict(XV, verbose=0, callbacks=[swap, seen])  # the peer's has the weights now
    plain = model.predict(XV, verbose=0)
    for hook in ("test_begin", "predict_begin"):
        for weights, average in seen.at[hook]:
            assert_same(weights, before[1])
            assert_same(average, before[0])
    assert_same(raw(model), before[0])
    assert_same(averages(model), before[1])
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-4


@on_one_backend
def test_the_peer_leaves_the_average_after_predict() -> None:
    model, peer = build(), keras.callbacks.SwapEMAWeights()
    for _ in range(3):
        model.train_on_batch(X[:8], Y[:8])
    before = raw(model), averages(model)
    model.predict(XV, verbose=0, callbacks=[peer])
    for got, left, own in zip(raw(model), before[1], before[0], strict=True):
        np.testing.assert_allclose(got, left, rtol=1e-5, atol=1e-7)
        assert np.abs(got - own).max() > 1e-9


def test_at_the_end_of_an_epoch_for_other_callbacks(tmp_path: Path) -> None:
    want = reference(3)
    model, seen = build(), Seen()
    saved = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True)
    fit(model, SwapEMAWeights(swap_on_epoch=True), seen, saved, epochs=3)
    for epoch, (weights, average) in enumerate(seen.at["epoch_end"]):
        assert_same(weights, want[epoch][1])
        assert_same(average, want[epoch][0] if epoch < 2 else want[epoch][1])  # as the peer's
    for epoch, (weights, average) in enumerate(seen.at["epoch_begin"]):
        assert_same(weights, want[epoch][0])
        assert_same(average, want[epoch][1])
    assert_same(raw(model), want[2][1])
    other = build()
    for epoch in range(3):
        other.load_weights(tmp_path / f"{epoch + 1}.weights.h5")
        assert_same(raw(other), want[epoch][1])


def test_a_fit_that_ends_early_ends_with_the_average() -> None:
    want = reference(2)

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.stop_training = epoch == 1

    for order in (lambda a, b: (a, b), lambda a, b: (b, a)):
        model, swap = build(), SwapEMAWeights(swap_on_epoch=True)
        fit(model, *order(swap, Stop()), epochs=9)
        assert_same(raw(model), want[1][1])
        assert_same(averages(model), want[1][1])
        assert "finalize_variable_values" not in vars(model.optimizer)
        assert "evaluate" not in vars(model)
        fit(model, swap, epochs=1)  # and on
    model = build()
    fit(model, keras.callbacks.SwapEMAWeights(swap_on_epoch=True), Stop(), epochs=9)
    assert all(  # the peer's: the weights, and no average any more
        np.abs(got - average).max() > 1e-6
        for got, average in zip(raw(model), want[1][1], strict=True)
    )


def test_a_second_fit_goes_on_as_without() -> None:
    plain, model, swap = build(), build(), SwapEMAWeights(swap_on_epoch=True)
    for _ in range(2):
        fit(plain, validation_data=None)
        if BACKEND == "jax":  # where Keras lets two variables share an array that it donates
            for one in plain.optimizer._model_variables_moving_average:
                one.assign(keras.ops.copy(one))
        fit(model, swap)
        assert_same(raw(model), raw(plain))
        assert_same(averages(model), averages(plain))


def test_numbers_are_the_peers() -> None:
    losses, ends = [], []
    for kind in (SwapEMAWeights, keras.callbacks.SwapEMAWeights):
        for on_epoch in (False, True):
            model = build()
            losses.append(fit(model, kind(on_epoch), epochs=3).history["val_loss"])
            ends.append(raw(model))
    for loss, end in zip(losses[1:], ends[1:], strict=True):
        np.testing.assert_allclose(loss, losses[0], rtol=1e-4)
        for one, first in zip(end, ends[0], strict=True):
            np.testing.assert_allclose(one, first, rtol=1e-4, atol=1e-6)


def test_a_failing_evaluation_gives_the_weights_back() -> None:
    class Failing(keras.callbacks.Callback):
        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            raise RuntimeError("planned")

    want = reference(1)
    model, swap = build(), SwapEMAWeights()
    with pytest.raises(RuntimeError, match="planned"):
        fit(model, swap, Failing())
    if BACKEND == "jax":  # where even a failing fit ends with the average
        assert_same(raw(model), want[0][1])
    else:
        assert_same(raw(model), want[0][0])
    assert_same(averages(model), want[0][1])

    model = build()
    for _ in range(3):
        model.train_on_batch(X[:8], Y[:8])
    before = raw(model), averages(model)
    statistics = values(model.non_trainable_variables)

    class Bad(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return (X[:4, :3] if index else X[:4]), Y[:4]  # of another width

    # Each backend has an error of its own.
    with pytest.raises(Exception):  # noqa: B017, PT011
        model.evaluate(Bad(), verbose=0, callbacks=[swap])
    assert_same(raw(model), before[0])
    assert_same(averages(model), before[1])
    assert_same(values(model.non_trainable_variables), statistics)
    model.evaluate(XV, YV, verbose=0, callbacks=[swap])
    assert_same(raw(model), before[0])


def test_before_the_first_step_the_model_is_evaluated() -> None:
    model, swap, seen = new(), SwapEMAWeights(), Seen()
    before = raw(model)
    got = model.evaluate(XV, YV, verbose=0, callbacks=[swap])
    assert got == model.evaluate(XV, YV, verbose=0)
    model.optimizer.build(model.trainable_variables)
    assert model.evaluate(XV, YV, verbose=0, callbacks=[swap, seen]) == got
    assert_same(seen.at["test_begin"][0][0], before)
    assert_same(raw(model), before)
    peer = keras.callbacks.SwapEMAWeights()
    if BACKEND == "tensorflow":
        with pytest.raises(ValueError, match="use_ema"):
            new().evaluate(XV, YV, verbose=0, callbacks=[peer])
        return
    theirs = new().evaluate(XV, YV, verbose=0, callbacks=[peer])
    assert theirs == pytest.approx(float((YV**2).mean()), rel=1e-5)  # of weights that are zero
    assert abs(theirs - got) > 1e-3


def test_optimizers_within_others() -> None:
    model, seen = build(wrap=keras.optimizers.LossScaleOptimizer), Seen()
    fit(model, SwapEMAWeights(), seen, epochs=1)
    (at_test,), (at_end,) = seen.at["test_begin"], seen.at["epoch_end"]
    assert_same(at_test[0], at_end[1])
    assert_same(at_test[1], at_end[0])
    assert_differ(*at_end)


@on_one_backend
def test_what_is_refused() -> None:
    model = build()
    model.compile("sgd", "mse")
    for call in (
        lambda: fit(model, SwapEMAWeights()),
        lambda: model.predict(XV, verbose=0, callbacks=[SwapEMAWeights()]),
    ):
        with pytest.raises(ArgumentError, match="use_ema=True"):
            call()
    assert issubclass(ArgumentError, ValueError)
    model = build()
    with pytest.raises(StateError, match="two SwapEMAWeights"):
        fit(model, SwapEMAWeights(), SwapEMAWeights())


def test_a_saved_model_goes_on(tmp_path: Path) -> None:
    want = reference(3)

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 0:
                self.model.save(tmp_path / "model.keras")

    fit(build(), Save(), SwapEMAWeights(swap_on_epoch=True))
    model, seen = keras.models.load_model(tmp_path / "model.keras"), Seen()
    fit(model, SwapEMAWeights(), seen, epochs=3, initial_epoch=1)
    for (weights, average), known in zip(seen.at["test_begin"], want[1:], strict=True):
        for got, exact in zip(weights + average, known[1] + known[0], strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-7)


@on_one_backend
def test_interface() -> None:
    assert SwapEMAWeights().swap_on_epoch is False
    assert SwapEMAWeights(True).swap_on_epoch is True
    assert isinstance(SwapEMAWeights(), keras.callbacks.Callback)


def failing_data() -> Any:
    """Batches of a file that cannot be read to the end."""
    yield X[:8], Y[:8]
    raise OSError("planned")


class Raising(keras.callbacks.Callback):
    """Ends a call at one of its hooks."""

    def __init__(self, hook: str, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()

        def planned(*_: Any, **__: Any) -> None:
            raise error("planned")

        setattr(self, hook, planned)


def trained() -> tuple[Any, tuple[Weights, Weights]]:
    model = build()
    for _ in range(3):
        model.train_on_batch(X[:8], Y[:8])
    before = raw(model), averages(model)
    assert_differ(*before)
    return model, before


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


BROKEN: dict[str, Any] = {
    "evaluate": lambda model, swap: model.evaluate(failing_data(), verbose=0, callbacks=[swap]),
    "predict": lambda model, swap: model.predict(failing_data(), verbose=0, callbacks=[swap]),
    "hook": lambda model, swap: CALLS["evaluate"](model, swap, Raising("on_test_batch_end")),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("after", ["evaluate", "fit", "train"])
@pytest.mark.parametrize("which", ["same", "fresh", "none"])
def test_what_a_call_left_that_raised_is_taken_back(broken: str, after: str, which: str) -> None:
    model, before = trained()
    swap = SwapEMAWeights()
    with pytest.raises(Exception, match="planned"):
        BROKEN[broken](model, swap)
    some = {"same": [swap], "fresh": [SwapEMAWeights()], "none": []}[which]
    del swap
    if after in CALLS:
        found = CALLS[after](model, *some)
        assert_same(raw(model), before[0])
        assert_same(averages(model), before[1])
        np.testing.assert_allclose(found, CALLS[after](trained()[0], *some), rtol=1e-6)
    else:
        other = trained()[0]
        for one, with_some in ((model, some), (other, [])):
            if after == "fit":
                fit(one, *with_some, epochs=1)
            else:
                one.train_on_batch(X[:8], Y[:8])
        assert_same(raw(model), raw(other))
        assert_same(averages(model), averages(other))
    assert left_in(model) == set()


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
    with pytest.raises(error, match="planned"):
        fit(model, swap, Raising(hook, error), epochs=3)
    want = reference(1)[0] if hook == "on_epoch_end" else (raw(model), averages(model))
    on_epoch = after == "swapping fit"
    some = {"same": [swap], "fresh": [SwapEMAWeights(on_epoch)], "none": []}[which]
    if after in CALLS:
        CALLS[after](model, *some)
        if BACKEND != "jax":  # where even a failing fit ends with the average
            assert_same(raw(model), want[0])
            assert_same(averages(model), want[1])
    elif BACKEND == "jax":
        if which != "none":  # Keras cannot go on there, see above
            fit(model, *some, epochs=1)
            assert_same(raw(model), averages(model))
    else:
        seen = Seen()
        start: list[Weights] = []
        note = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: start or start.append(raw(model))
        )
        fit(model, *some, note, seen, epochs=1)
        assert_same(start[0], want[0])
        assert_same(raw(model), averages(model))
    assert left_in(model) == set() or (BACKEND, which) == ("jax", "none")


@pytest.mark.parametrize("which", ["same", "fresh"])
@pytest.mark.parametrize("on_epoch", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_evaluations_by_other_callbacks(which: str, on_epoch: bool, first: bool) -> None:
    if BACKEND == "jax":
        pytest.skip("Keras loses the state of a fit there in which the model is evaluated")
    want = reference(3)
    model, swap, seen, found = build(), SwapEMAWeights(on_epoch), Seen(), []

    class Nested(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            some = swap if which == "same" else SwapEMAWeights()
            before = raw(model)
            for call in CALLS.values():
                call(model, some, Noted())
            assert_same(raw(model), before)

    class Noted(keras.callbacks.Callback):
        def on_test_begin(self, logs: Any = None) -> None:
            found.append(raw(model))

        def on_predict_begin(self, logs: Any = None) -> None:
            found.append(raw(model))

    callbacks = [Nested(), swap, seen] if first else [swap, Nested(), seen]
    fit(model, *callbacks, epochs=3)
    for i, one in enumerate(found):
        assert_same(one, want[i // 2][1])
    assert len(found) == 6
    for epoch, (weights, _) in enumerate(seen.at["epoch_end"]):
        assert_same(weights, want[epoch][on_epoch])
    assert_same(raw(model), want[2][1])
    assert left_in(model) == set()


def test_weights_are_saved_and_loaded_as_such_after_a_call_that_raised(tmp_path: Path) -> None:
    path = tmp_path / "model.weights.h5"
    (model, before), swap = trained(), SwapEMAWeights()
    with pytest.raises(RuntimeError, match="planned"):
        BROKEN["hook"](model, swap)
    model.save_weights(path)
    assert_same(raw(model), before[0])
    with pytest.raises(RuntimeError, match="planned"):
        BROKEN["hook"](model, swap)
    model.set_weights([2 * one for one in model.get_weights()])
    assert_same(averages(model), before[1])
    model.load_weights(path)
    assert_same(raw(model), before[0])
    assert left_in(model) == set()


def test_a_prediction_within_an_evaluation_is_of_the_average_too() -> None:
    if BACKEND == "jax":
        pytest.skip("a model has no weights there while it is evaluated")
    (model, before), seen = trained(), Seen()

    class Predicts(keras.callbacks.Callback):
        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.predict(XV, verbose=0)

        def on_test_end(self, logs: Any = None) -> None:
            seen._note("test_end")

    seen.set_model(model)
    CALLS["evaluate"](model, Predicts(), SwapEMAWeights())
    assert_same(seen.at["test_end"][0][0], before[1])
    assert_same(raw(model), before[0])


@on_one_backend
def test_two_in_one_list_change_nothing() -> None:
    model, before = trained()
    for call in (*CALLS.values(), lambda one, *some: fit(one, *some)):
        with pytest.raises(StateError, match="two SwapEMAWeights"):
            call(model, SwapEMAWeights(), SwapEMAWeights())
        if BACKEND != "jax" or call in CALLS.values():
            assert_same(raw(model), before[0])
        assert left_in(model) == set()


@on_one_backend
def test_a_model_that_was_not_compiled() -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    with pytest.raises(ArgumentError, match="use_ema=True"):
        model.predict(XV, verbose=0, callbacks=[SwapEMAWeights()])


@on_one_backend
def test_one_callback_for_several_models() -> None:
    (model, before), (other, their_before) = trained(), trained()
    swap = SwapEMAWeights()
    with pytest.raises(Exception, match="planned"):
        model.evaluate(failing_data(), verbose=0, callbacks=[swap])
    CALLS["evaluate"](other, swap)
    for one, known in ((model, before), (other, their_before)):
        assert_same(raw(one), known[0])
        assert_same(averages(one), known[1])
        assert left_in(one) == set()
