"""The Keras bridge; `test_file_passes_on_another_backend` reruns this file on other backends."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import fastema
from fastema.bridges import registry
from fastema.errors import BridgeError, LayoutError, StateError

from ..average.truth import Loop
from ..support.process import run_python
from ..support.requirements import require_packages

# Keras' own, outdated conversions to NumPy.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

BACKEND = keras.backend.backend()
IMMUTABLE = BACKEND == "jax"
WIDE = not IMMUTABLE  # JAX would narrow float64 to float32
AVERAGED = [
    *("one/kernel", "one/bias", "batch_normalization/gamma", "batch_normalization/beta"),
    *("two/kernel", "two/bias"),
]
COPIED = ["batch_normalization/moving_mean", "batch_normalization/moving_variance"]
CODES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["jax", pytest.param("tensorflow", marks=pytest.mark.tensorflow)]
)
def test_file_passes_on_another_backend(backend: str, tmp_path: Path) -> None:
    if backend == BACKEND:
        return  # this run tests it
    require_packages(backend)
    environment = {
        "KERAS_BACKEND": backend,
        "KERAS_HOME": os.fspath(tmp_path),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
    }
    options = ("-q", "-p", "no:cacheprovider", "-k", "not another_backend")
    done = run_python("-m", "pytest", __file__, *options, environment=environment, timeout=240)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def to_numpy(array: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(array))


def build(seed: int = 0, names: tuple[str, str] = ("one", "two"), dtype: str = "float32") -> Any:
    layers = keras.layers
    one, two = (layers.Dense(4, name=name, dtype=dtype) for name in names)
    made = keras.Sequential([layers.Input((4,)), one, layers.BatchNormalization(dtype=dtype), two])
    assign_weights(made, seed)
    return made


def assign_weights(made: Any, seed: int) -> None:
    """Assign new, nonzero weights."""
    generator = np.random.default_rng(seed)
    for one in made.weights:
        one.assign(generator.normal(size=one.shape) ** 2 + 0.5)


def bits(made: Any) -> list[bytes]:
    return [to_numpy(one).tobytes() for one in made.weights]


def shadow(ema: Any) -> dict[str, np.ndarray]:
    return {name: to_numpy(one).astype(np.float64) for name, one in ema.shadow.items()}


def by_name(made: Any) -> dict[str, np.ndarray]:
    pairs = zip(registry.leaves_of(made).names, made.weights, strict=True)
    return {name: to_numpy(one).astype(np.float64) for name, one in pairs}


def build_average(dtype: str = "float32", **options: Any) -> tuple[Any, Any]:
    """Return a model and its average after three updates."""
    made = build(dtype=dtype)
    ema = fastema.EMA(made, 0.5, **options)
    for n in range(1, 4):
        assign_weights(made, n)
        ema.update()
    return made, ema


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", *["float64"] * WIDE])
@pytest.mark.parametrize("stored", [None, "float32"])
def test_average_equals_a_float64_loop(dtype: str, stored: str | None) -> None:
    made = build(dtype=dtype)
    ema = fastema.EMA(made, 0.9, shadow_dtype=stored)
    assert list(ema.shadow) == AVERAGED + COPIED
    assert ema.averaged_names == set(AVERAGED)
    now = by_name(made)
    code, wide = CODES[stored or dtype], "f64" if dtype == "float64" else "f32"
    loops = {n: Loop(now[n], code, wide, code in ("f16", "bf16")) for n in AVERAGED}
    for n in range(1, 8):
        assign_weights(made, n)
        before = bits(made)
        ema.update()
        assert bits(made) == before
        for name, loop in loops.items():
            loop.step(by_name(made)[name], 0.1)
    for name, loop in loops.items():
        loop.check(shadow(ema)[name], name)
    for name in COPIED:
        np.testing.assert_array_equal(shadow(ema)[name], by_name(made)[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [None, "float32", "bf16+16"])
def test_swaps_restore_the_weights_bitwise(dtype: str, stored: str | None) -> None:
    made, ema = build_average(dtype, shadow_dtype=stored)
    raw, average = bits(made), shadow(ema)
    for _ in range(3):
        ema.apply_shadow()
        for name, x in by_name(made).items():
            np.testing.assert_allclose(x, average[name], rtol=2**-7)
        with pytest.raises(StateError):
            ema.update()
        ema.restore()
        assert bits(made) == raw
        np.testing.assert_equal(shadow(ema), average)
    with pytest.raises(ZeroDivisionError), ema.swapped():
        made.evaluated = 1 / 0
    assert bits(made) == raw


def test_policies_of_frozen_layers_and_buffers() -> None:
    made = build()
    made.layers[-1].trainable = False
    frozen = {"two/kernel", "two/bias"}
    ema = fastema.EMA(made, 0.5)
    assert set(ema.shadow) == {*AVERAGED, *COPIED} - frozen
    everything = fastema.EMA(made, 0.5, frozen="average", buffers="average")
    assert everything.averaged_names == {*AVERAGED, *COPIED}
    assert set(fastema.EMA(made, 0.5, buffers="skip", frozen="copy").shadow) == set(AVERAGED)
    made.layers[-1].trainable = True
    with pytest.raises(LayoutError, match="'two/kernel' is trained now but was frozen"):
        ema.update()
    made.layers[-1].trainable = False
    ema.update()
    assert ema.num_updates == 1
    made.trainable = False
    with pytest.raises(LayoutError, match="frozen"):
        fastema.EMA(made, 0.5)


def test_models_that_do_not_match_are_refused() -> None:
    made, ema = build_average()
    before = shadow(ema)
    changed, renamed = build(), build(2, names=("x", "two"))
    changed.pop()
    for odd in ({}, made.weights, 3, renamed, changed):
        for call in (ema.update, ema.apply_shadow):
            with pytest.raises(BridgeError if odd == 3 else LayoutError):
                call(odd)
    np.testing.assert_equal(shadow(ema), before)
    assert ema.num_updates == 3
    with pytest.raises(BridgeError, match="is not built"):
        fastema.EMA(keras.Sequential([keras.layers.Dense(3)]), 0.5)


def test_failed_assignment_leaves_the_models_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    if not IMMUTABLE:
        return  # other backends write in place
    (made, ema), target = build_average(), build(7)
    raw, theirs, average = bits(made), bits(target), shadow(ema)
    original = keras.Variable.assign
    for failing in range(1, 9):
        for call in (ema.apply_shadow, lambda: ema.copy_to(target)):
            left = iter(range(failing - 1, -1, -1))

            def assign(self: Any, value: Any, left: Iterator[int] = left) -> Any:
                if next(left, None) == 0:
                    raise MemoryError("no room")
                return original(self, value)

            monkeypatch.setattr(keras.Variable, "assign", assign)
            with pytest.raises(MemoryError):
                call()
            monkeypatch.undo()
            assert (bits(made), bits(target), ema.applied) == (raw, theirs, False)
    np.testing.assert_equal(shadow(ema), average)
    with ema.swapped():
        assert bits(made) != raw
    assert bits(made) == raw
