"""Tests of EMAWeights in evaluation and of calls that raise; see test_backends.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from fastema.errors import StateError
from fastema.keras import EMAWeights

from .data import BACKEND, BATCH, BATCHES, DECAY, MARKS, XV, YV, X, Y, fit
from .models import assert_same, differ, model_of, set_weights, trained_weights, weights
from .runs import ErrorAt, HookRecorder, average, fit_model, record_run

pytestmark = MARKS


@pytest.mark.parametrize("kind", ["plain", "bfloat16"])
def test_validation_uses_the_average(kind: str) -> None:
    run = record_run(kind, epochs=1)
    model, ema, seen = model_of(kind), EMAWeights(DECAY, shadow_dtype="float32"), HookRecorder()
    history = fit(model, ema, seen, epochs=1).history
    assert model.evaluate(XV, YV, batch_size=BATCH, verbose=0) == history["val_loss"][0]
    ema.restore()
    assert_same(weights(model), run.steps[-1])
    (during,) = seen.at["test_begin"]
    bound = 2.0**-8 if kind == "bfloat16" else 0.0
    for name, value in average(ema).items():
        got, want = during[name].astype(np.float64), value.astype(np.float64)
        np.testing.assert_allclose(got, want, rtol=bound, atol=0, err_msg=name)
    assert not differ({n: during[n] for n in during if "moving" in n}, run.steps[-1])
    other = model_of(kind)
    set_weights(other, during)
    assert other.evaluate(XV, YV, batch_size=BATCH, verbose=0) == history["val_loss"][0]


def test_evaluate_and_predict_use_the_average_and_restore_every_bit() -> None:
    now, seen = fit_model(), HookRecorder()
    model, ema, raw, avg = now
    assert differ(trained_weights(model, raw), trained_weights(model, avg))
    loss = model.evaluate(XV, YV, verbose=0, callbacks=[ema, seen])
    output = model.predict(XV, verbose=0, callbacks=[ema, seen])
    assert_same(seen.at["test_begin"][0], avg)
    assert_same(seen.at["predict_begin"][0], avg)
    now.assert_unchanged()
    assert model.predict(XV, verbose=0).tobytes() != output.tobytes()
    with ema.swapped():
        assert ema.applied
        assert_same(weights(model), avg)
        assert model.evaluate(XV, YV, verbose=0) == loss
        assert model.evaluate(XV, YV, verbose=0, callbacks=[ema]) == loss
        with ema.swapped():
            assert_same(weights(model), avg)
        assert_same(weights(model), avg)
        assert model.predict(XV, verbose=0, callbacks=[ema]).tobytes() == output.tobytes()
        assert_same(weights(model), avg)
    now.assert_unchanged()


@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("call", ["evaluate", "fit"])
def test_error_in_jax_compiled_code_restores_the_weights(call: str, good: int) -> None:
    """By then JAX has donated the arguments, including the random state."""
    if BACKEND != "jax":
        return  # only JAX donates the arguments of a computation
    import jax

    calls = [-1]

    class Bomb(keras.layers.Layer):
        def call(self, x: Any, training: bool = False) -> Any:
            def host(array: Any) -> Any:
                calls[0] -= 1
                if calls[0] == -1:
                    raise ZeroDivisionError("planted")
                return np.asarray(array)

            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return x if training else jax.pure_callback(host, shape, x)

    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(3), keras.layers.Dropout(0.25), Bomb(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers], name="net")
    model.compile("sgd", "mse")
    ema = EMAWeights(DECAY)
    fit(model, ema, epochs=1, validation_data=None)
    if good:
        ema.restore()
    held, avg = weights(model), average(ema)
    calls[0] = good
    fails = {
        "fit": lambda: fit(model, ema, epochs=1, validation_batch_size=BATCH),
        "evaluate": lambda: model.evaluate(XV, YV, batch_size=BATCH, verbose=0, callbacks=[ema]),
    }
    with pytest.raises(Exception, match=r"planted|NoneType"):  # Keras may fail afterwards
        fails[call]()
    assert calls[0] < 0
    assert not ema.applied
    if call == "evaluate":
        if good:
            assert_same(weights(model), held)
        else:  # the training weights come back
            assert differ(trained_weights(model), trained_weights(model, held))
        assert_same(average(ema), avg)
    calls[0] = -2
    before = ema.ema.num_updates
    fit(model, ema, epochs=1)
    assert ema.ema.num_updates == before + BATCHES
    assert all(np.isfinite(one).all() for one in weights(model).values())


USES: dict[str, Callable[[Any, Path], object]] = {
    "fit": lambda model, path: fit(model, epochs=1, validation_data=None),
    "train_on_batch": lambda model, path: model.train_on_batch(X[:BATCH], Y[:BATCH]),
    "evaluate": lambda model, path: [model.evaluate(XV, YV, verbose=0)],
    "predict": lambda model, path: model.predict(XV, verbose=0),
    "save": lambda model, path: model.save(path / "model.keras"),
    "save_weights": lambda model, path: model.save_weights(path / "model.weights.h5"),
    "get_weights": lambda model, path: model.get_weights(),
    "set_weights": lambda model, path: model.set_weights([2 * one for one in model.get_weights()]),
}


@pytest.mark.parametrize("use", ["evaluate", "predict", "get_weights", "save_weights"])
@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_use_of_the_model_after_an_interrupted_evaluation_or_within_one_sees_its_own_weights(
    call: str, use: str, tmp_path: Path
) -> None:
    now = fit_model()
    model, ema = now.model, now.ema
    run: Callable[..., Any] = {
        "evaluate": lambda *some: [model.evaluate(XV, YV, batch_size=1, verbose=0, callbacks=some)],
        "predict": lambda *some: model.predict(XV, batch_size=1, verbose=0, callbacks=some),
    }[call]
    want = run(ema)
    hook = {"evaluate": "on_test_batch_end", "predict": "on_predict_batch_end"}[call]
    with pytest.raises(KeyboardInterrupt):
        run(ema, ErrorAt(KeyboardInterrupt, hook, after=1))
    assert ema.applied
    USES[use](model, tmp_path)
    now.assert_unchanged()

    seen: list[Any] = []

    def look(batch: int, logs: Any) -> None:
        if batch == 1 and not seen:
            seen.append(weights(model))
            USES[use](model, tmp_path)
            seen.append(weights(model))

    got = run(ema, keras.callbacks.LambdaCallback(**{hook: look}))
    assert_same(seen[0], now.avg)
    assert_same(seen[1], now.raw)
    if call == "predict" or use not in ("evaluate", "predict"):  # those reset the metrics
        np.testing.assert_array_equal(got, want)
    now.assert_unchanged()


def test_fit_interrupted_between_epochs_leaves_the_average_until_the_model_is_trained() -> None:
    run = record_run()
    model, ema = model_of(), EMAWeights(DECAY)
    with pytest.raises(KeyboardInterrupt):
        fit(model, ema, ErrorAt(KeyboardInterrupt, "on_epoch_end"))
    assert ema.applied
    if BACKEND != "jax":
        assert_same(weights(model), average(ema))
    fit(model, ema, epochs=1)
    ema.restore()
    assert_same(weights(model), run.steps[-1])


def test_weights_that_another_callback_loads_at_the_end_of_an_epoch_stay() -> None:
    model, ema, loaded = model_of(), EMAWeights(DECAY), []

    def load(epoch: int, logs: Any) -> None:
        if epoch == 1:
            model.set_weights([2 * one for one in model.get_weights()])
            loaded.append(weights(model))

    fit(model, ema, keras.callbacks.LambdaCallback(on_epoch_end=load))
    assert not ema.applied
    assert_same(weights(model), loaded[0])
    fit(model, ema, epochs=1)
    assert ema.applied


def test_swapped_refuses_to_train_or_overwrite_the_average(tmp_path: Path) -> None:
    now = fit_model()
    model, ema, state = now.model, now.ema, now.ema.state_dict()
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    refused: dict[str, Callable[[], object]] = {
        "fit": lambda: USES["fit"](model, tmp_path),
        "fit while": lambda: fit(model, ema, epochs=1),
        "train_on_batch": lambda: USES["train_on_batch"](model, tmp_path),
        "set_weights": lambda: USES["set_weights"](model, tmp_path),
        "load_weights": lambda: model.load_weights(path),
        "update": ema.update,
        "load_state_dict": lambda: ema.load_state_dict(state),
    }
    with ema.swapped():
        for name, call in refused.items():
            words = f"{name.removesuffix(' while')} while the model holds the average"
            with pytest.raises(StateError, match=words):
                call()
        assert_same(weights(model), now.avg)
    now.assert_unchanged()
    model.load_weights(path)


def test_model_holds_the_average_after_fit_until_it_is_trained_or_gets_weights() -> None:
    run = record_run()
    model, ema = model_of(), EMAWeights(DECAY)
    fit(model, ema, epochs=1)
    avg = average(ema)
    loss = model.evaluate(XV, YV, verbose=0)
    with ema.swapped():
        with pytest.raises(StateError, match="fit while the model holds the average"):
            fit(model, epochs=1)
        assert_same(weights(model), avg)
    assert model.evaluate(XV, YV, verbose=0, callbacks=[ema]) == loss
    model.predict(XV, verbose=0, callbacks=[ema])
    assert_same(weights(model), avg)
    fit(model, epochs=1, validation_data=None)
    assert not ema.applied
    assert_same(weights(model), run.steps[-1])

    model, ema = model_of(), EMAWeights(DECAY)
    fit(model, ema, epochs=1)
    model.set_weights(model.get_weights())  # the average, to continue from there
    assert not ema.applied
    assert_same(weights(model), avg)
    ema.restore()
    assert_same(weights(model), avg)
