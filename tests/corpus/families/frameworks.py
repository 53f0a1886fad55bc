"""Averages of NumPy arrays and JAX trees."""

from typing import Any

import jax
import numpy as np

import fastema

from ..cases import Cases, case
from ..inputs import array, np_dtype, numbers
from ..record import attempt, flatten

CASES: Cases = {}

SHAPES = {"a": (70,), "b": (3, 5), "c": (), "d": (0, 2), "e": (2, 3, 4)}
CODES = ("f64", "f32", "f16", "bf16")
KINDS = {
    "EMA": lambda w, **o: fastema.EMA(w, 0.9, **o),
    "SWA": fastema.SWA,
    "SMA": lambda w, **o: fastema.SMA(w, 4, **o),
    "two": lambda w, **o: fastema.EMA(w, (0.5, 0.9), **o),
}
FORMATS: dict[str, dict[str, Any]] = {
    "none": {},
    "f32": {"shadow_dtype": "float32"},
    "bf16": {"shadow_dtype": "bfloat16"},
}


def _read(average: Any) -> dict[str, Any]:
    return {"shadows": [dict(one) for one in average.shadows], "num": average.num_updates}


def _arrays(code: str, step: int) -> dict[str, Any]:
    return {name: array(name, step, shape, code) for name, shape in SHAPES.items()}


def _arrays_like(weights: Any) -> dict[str, Any]:
    return {name: one.copy() for name, one in weights.items()}


@case(CASES, kind=KINDS, code=CODES, average=FORMATS)
def numpy_arrays(kind: Any, code: str, average: dict[str, Any]) -> Any:
    weights = _arrays(code, 0)
    weights["turned"] = array("turned", 0, (4, 5), code).T
    weights["part"] = array("part", 0, (40,), code)[3:36:2]
    ema = kind(weights, **average)
    for step in range(1, 51):
        for name, one in weights.items():
            one[...] = numbers(name, step, one.shape, code).astype(np_dtype(code))
        ema.update()
    found = _read(ema)
    with ema.swapped(which=0):
        found["inside"] = {name: one.copy() for name, one in weights.items()}
    other = kind(_arrays_like(weights), **average)
    other.load_state_dict(ema.state_dict())
    found["same"] = flatten(other.state_dict()) == flatten(ema.state_dict())
    return found | {"after": weights, "state": ema.state_dict(), "averaged": ema.averaged(which=0)}


@case(CASES, kind=KINDS, code=CODES, average=FORMATS)
def jax_trees(kind: Any, code: str, average: dict[str, Any]) -> Any:
    with jax.enable_x64(True):
        tree = {"layer": dict(map(_as_jax, _arrays(code, 0).items()))}
        ema = kind(tree, **average)
        for step in range(1, 21):
            tree = {"layer": dict(map(_as_jax, _arrays(code, step).items()))}
            ema.update(tree)
        found = _read(ema)
        found["averaged"] = ema.averaged(which=0)
        found["swapped"] = attempt(lambda: _inside(ema, tree))
        state = ema.state_dict()
        other = kind(tree, **average)
        other.load_state_dict(state)
        found["same"] = flatten(other.state_dict()) == flatten(state)
        return found | {"state": state}


def _as_jax(item: tuple[str, Any]) -> tuple[str, Any]:
    return item[0], jax.numpy.asarray(item[1])


def _inside(ema: Any, tree: Any) -> Any:
    with ema.swapped(tree, which=0) as model:
        return model


@case(CASES, framework=("numpy", "jax"), call=("lerp_", "swap_", "copy_", "Plan"))
def functions(framework: str, call: str) -> Any:
    a, b = _arrays("f32", 1), _arrays("f32", 2)
    if framework == "jax":
        a, b = dict(map(_as_jax, a.items())), dict(map(_as_jax, b.items()))
    tries = {
        "lerp_": lambda: fastema.lerp_(a, b, 0.25),
        "swap_": lambda: fastema.swap_(a, b),
        "copy_": lambda: fastema.copy_(a, b),
        "Plan": lambda: fastema.Plan(a, b).lerp_(0.25),
    }
    return {"outcome": attempt(tries[call]), "a": a, "b": b}


@case(CASES, dtype=("complex64", "complex128", "int32", "bool"))
def other_dtypes(dtype: str) -> Any:
    def build(step: int) -> Any:
        real = numbers("w", step, (2, 9), "f32").astype(np.float64)
        if dtype.startswith("complex"):
            return (real[0] + 1j * real[1]).astype(dtype)
        return (real[0] * 100).astype(dtype)

    weights = {"w": build(0), "x": array("x", 0, (3,), "f32")}
    ema = attempt(lambda: fastema.EMA(weights, 0.9))
    if isinstance(ema, Exception):
        return {"refused": ema}
    for step in range(1, 11):
        weights["w"][...] = build(step)
        weights["x"][...] = numbers("x", step, (3,), "f32")
        ema.update()
    return _read(ema)


@case(CASES)
def mixed_frameworks() -> Any:
    mixed = {"a": np.ones(3, np.float32), "b": jax.numpy.ones(3)}
    return {"outcome": attempt(lambda: fastema.EMA(mixed))}
