"""Averages of TensorFlow variables: tf.train's class, and fastema's own averages."""

import tempfile
from typing import Any

import tensorflow as tf

import fastema
from fastema.tensorflow import ExponentialMovingAverage

from ..cases import Cases, case
from ..inputs import np_dtype, numbers
from ..record import attempt, flatten

CASES: Cases = {}

SHAPES = {"a": (70,), "b": (3, 5), "c": (), "d": (0, 2), "e": (2, 3, 4)}
CODES = ("f64", "f32", "f16", "bf16")


def _value(name: str, step: int, code: str) -> Any:
    return tf.constant(numbers(name, step, SHAPES[name], code).astype(np_dtype(code)))


def _variables(code: str, step: int = 0) -> dict[str, Any]:
    return {name: tf.Variable(_value(name, step, code), name=name) for name in SHAPES}


def _move(variables: dict[str, Any], step: int, code: str) -> None:
    for name, one in variables.items():
        one.assign(_value(name, step, code))


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "counted": {"num_updates": 3},
    "nearest": {"rounding": "nearest"},
    "seed": {"seed": 9},
    "debiased": {"zero_debias": True},
}


@case(CASES, rtol=0.0, code=CODES, options=OPTIONS)
def tf_train(code: str, options: dict[str, Any]) -> Any:
    variables = _variables(code)
    weights = list(variables.values())
    ema = ExponentialMovingAverage(0.9, **options)
    ema.apply(weights)
    for step in range(1, 31):
        _move(variables, step, code)
        ema.apply(weights)
    found = {name: ema.average(one) for name, one in variables.items()}
    found = {"averages": {name: one.numpy() for name, one in found.items()}}
    found["shadow"] = {name: one.numpy() for name, one in ema.shadow.items()}
    with ema.swapped():
        found["inside"] = {name: one.numpy() for name, one in variables.items()}
    found["after"] = {name: one.numpy() for name, one in variables.items()}
    found["names"] = {name: ema.average_name(one) for name, one in variables.items()}
    found["restored names"] = attempt(lambda: sorted(ema.variables_to_restore(weights)))
    return found


@case(CASES, code=("f32", "bf16"))
def tf_train_in_a_function(code: str) -> Any:
    variables = _variables(code)
    ema = ExponentialMovingAverage(0.9)
    ema.apply(list(variables.values()))
    step_variable = tf.Variable(0)

    @tf.function
    def step() -> None:
        step_variable.assign_add(1)
        ema.apply(list(variables.values()))

    for n in range(1, 6):
        _move(variables, n, code)
        step()
    return {name: one.numpy() for name, one in ema.shadow.items()}


@case(CASES, debias=(False, True))
def tf_train_of_tensors(debias: bool) -> Any:
    ema = ExponentialMovingAverage(0.75, zero_debias=debias)
    found = {}
    for step in range(1, 6):
        tensor = _value("b", step, "f32")
        outcome = attempt(lambda tensor=tensor: ema.apply([tensor]))
        found[step] = outcome if isinstance(outcome, Exception) else "applied"
    return found | {"shadow": {name: one.numpy() for name, one in ema.shadow.items()}}


@case(CASES)
def tf_train_checkpoints() -> Any:
    variables = _variables("f32")
    ema = ExponentialMovingAverage(0.9)
    ema.apply(list(variables.values()))
    _move(variables, 1, "f32")
    ema.apply(list(variables.values()))
    with tempfile.TemporaryDirectory() as folder:
        path = tf.train.Checkpoint(ema=ema).save(f"{folder}/x")
        names = sorted(name for name, _ in tf.train.list_variables(path))
        other_variables = _variables("f32", 5)
        other = ExponentialMovingAverage(0.9)
        other.apply(list(other_variables.values()))
        tf.train.Checkpoint(ema=other).restore(path).expect_partial()
    return {"names": names, "restored": {k: v.numpy() for k, v in other.shadow.items()}}


KINDS = {
    "EMA": lambda w, **o: fastema.EMA(w, 0.9, **o),
    "SWA": fastema.SWA,
    "SMA": lambda w, **o: fastema.SMA(w, 4, **o),
    "two": lambda w, **o: fastema.EMA(w, (0.5, 0.9), **o),
}


@case(CASES, kind=KINDS, code=CODES, average=(None, "float32", "bfloat16"))
def averages(kind: Any, code: str, average: Any) -> Any:
    variables = _variables(code)
    ema = kind(variables, shadow_dtype=average)
    for step in range(1, 21):
        _move(variables, step, code)
        ema.update()
    found = {"shadows": [dict(one) for one in ema.shadows], "updates": ema.num_updates}
    with ema.swapped(which=0):
        found["inside"] = {name: one.numpy() for name, one in variables.items()}
    state = ema.state_dict()
    other = kind(_variables(code, 9), shadow_dtype=average)
    other.load_state_dict(state)
    found["same"] = flatten(other.state_dict()) == flatten(state)
    return found | {"after": {name: one.numpy() for name, one in variables.items()}}


@case(CASES, bad=("decay", "name", "rounding", "seed", "integer", "updates", "unknown", "text"))
def refusals(bad: str) -> Any:
    tries = {
        "decay": lambda: ExponentialMovingAverage(1.5),
        "name": lambda: ExponentialMovingAverage(0.9, name=""),
        "rounding": lambda: ExponentialMovingAverage(0.9, rounding="up"),
        "seed": lambda: ExponentialMovingAverage(0.9, seed=-1),
        "integer": lambda: ExponentialMovingAverage(0.9).apply([tf.Variable(1)]),
        "updates": lambda: ExponentialMovingAverage(0.9, num_updates=-1),
        "unknown": lambda: ExponentialMovingAverage(0.9).average(tf.Variable(1.0)).numpy(),
        "text": lambda: ExponentialMovingAverage("a"),
    }
    return {"outcome": attempt(tries[bad])}
