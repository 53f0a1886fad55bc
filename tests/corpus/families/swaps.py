"""Averages in the model: values inside and after, of every kind, dtype and way."""

from functools import partial
from typing import Any

import torch

import fastema

from ..cases import Cases, case
from ..record import attempt
from ..weights import TORCH, Net, fill, net, read, train, values, versions

CASES: Cases = {}

KINDS = {
    "EMA": partial(fastema.EMA, decay=0.9),
    "two": partial(fastema.EMA, decay=(0.5, 0.9)),
    "SMA": partial(fastema.SMA, window=4),
    "copying": partial(fastema.EMA, decay=0.9, frozen="copy", buffers="average"),
}
PAIRS = [(w, a) for w in TORCH for a in (None, "float32", "bfloat16", "bf16+16")]


def _trained(kind: Any, code: str, average: Any, steps: int = 8) -> tuple[Any, Any]:
    model = net(code)
    ema = kind(model, shadow_dtype=average)
    train(model, ema, steps=range(1, steps + 1))
    return model, ema


@case(CASES, kind=KINDS, pair={f"{w} {a}": (w, a) for w, a in PAIRS})
def swapped_in_a_block(kind: Any, pair: Any) -> Any:
    trained = attempt(lambda: _trained(kind, *pair))
    if isinstance(trained, Exception):
        return {"refused": trained}
    model, ema = trained
    found = {"averages": [dict(one) for one in ema.shadows]}
    for which in range(len(ema.shadows)):
        with ema.swapped(which=which) as yielded:
            found[f"inside {which}"] = values(model)
            found[f"applied {which}"] = ema.applied
            found[f"yields the model {which}"] = yielded is model
    found |= {"after": values(model), "versions": versions(model), "applied": ema.applied}
    train(model, ema, steps=range(9, 12))
    return found | {"later": read(ema)}


@case(CASES, kind=KINDS, code=("f32", "bf16"))
def apply_and_restore(kind: Any, code: str) -> Any:
    model, ema = _trained(kind, code, None)
    last = len(ema.shadows) - 1
    ema.apply_shadow(which=last)
    found = {"inside": values(model), "applied": ema.applied, "shadow": dict(ema.shadows[last])}
    found["state inside"] = attempt(ema.state_dict)
    found["update inside"] = attempt(ema.update)
    found["again"] = attempt(lambda: ema.apply_shadow(which=last))
    ema.restore()
    found |= {"after": values(model), "restore again": attempt(ema.restore)}
    return found | {"versions": versions(model)}


@case(CASES, kind=KINDS)
def a_block_that_raises(kind: Any) -> Any:
    model, ema = _trained(kind, "f32", "bfloat16")
    before = values(model)

    def block() -> None:
        with ema.swapped(which=0):
            raise KeyError("inside")

    outcome, after = attempt(block), values(model)
    same = all(torch.equal(before[name], after[name]) for name in before)
    return {"outcome": outcome, "same": same, "after": after, "applied": ema.applied}


@case(CASES, kind=KINDS, code=("f32", "f16"))
def another_model(kind: Any, code: str) -> Any:
    model, ema = _trained(kind, code, "float32")
    other = fill(Net(code), 77)
    with ema.swapped(other, which=0):
        found = {"inside": values(other), "own": values(model)}
    found["after"] = values(other)
    ema.copy_to(other, which=0)
    copied = values(other)
    listed = kind([model.cube, model.long])
    return found | {
        "copied": copied,
        "averaged": attempt(lambda: ema.averaged(which=0)),
        "averaged list": attempt(lambda: listed.averaged(which=0)),
    }


@case(CASES, kind=KINDS, code=("f32", "bf16"))
def state_of_the_model(kind: Any, code: str) -> Any:
    _, ema = _trained(kind, code, "float32")
    state = ema.model_state_dict(which=0)
    fresh = Net(code)
    return {"state": state, "loads": str(fresh.load_state_dict(state)), "fresh": values(fresh)}


@case(CASES)
def writes_inside_the_block() -> Any:
    model, ema = _trained(KINDS["EMA"], "f32", None)

    def block() -> None:
        with ema.swapped():
            fill(model, 60)

    return {"outcome": attempt(block), "model": values(model), **read(ema)}


@case(CASES)
def weights_that_move_inside_the_block() -> Any:
    model, ema = _trained(KINDS["EMA"], "f32", None)
    with ema.swapped():
        model.cube.data = model.cube.data.clone()
    return {"model": values(model), **read(ema)}
