"""lerp_, swap_, copy_, Plan, mean_between and update_bn, over dtypes, layouts and options."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

import fastema

from ..cases import Cases, case
from ..inputs import array
from ..record import attempt
from ..weights import TORCH, Net, fill, net, values, versions

CASES: Cases = {}
CODES = tuple(TORCH)


def _tensors(code: str, step: int) -> dict[str, Any]:
    dtype = TORCH[code]
    tensors = {
        "odd": torch.zeros(67, dtype=dtype),
        "turned": torch.zeros(5, 9, dtype=dtype).t(),
        "step": torch.zeros(22, dtype=dtype)[1::2],
        "offset": torch.zeros(40, dtype=dtype)[7:],
        "number": torch.zeros((), dtype=dtype),
        "empty": torch.zeros(3, 0, dtype=dtype),
    }
    return fill(tensors, step)


@case(CASES, avg=CODES, x=CODES, weight=(0.0, 0.1, 1.0))
def lerp(avg: str, x: str, weight: float) -> Any:
    a, b = _tensors(avg, 1), _tensors(x, 2)
    fastema.lerp_(a, b, weight)
    return {"avg": a, "x": b if weight == 0.1 else None, "versions": versions(a)}


@case(CASES, a=CODES, b=CODES)
def swap_and_copy(a: str, b: str) -> Any:
    found = {}
    for name in ("swap_", "copy_"):
        one, other = _tensors(a, 1), _tensors(b, 2)
        outcome = attempt(partial(getattr(fastema, name), one, other))
        found[name] = {"outcome": outcome, "a": one, "b": other, "versions": versions(one)}
    return found


@case(CASES, avg=CODES, x=CODES, rounding=("nearest", "stochastic"))
def plans(avg: str, x: str, rounding: str) -> Any:
    a, b = _tensors(avg, 1), _tensors(x, 2)
    plan = attempt(lambda: fastema.Plan(a, b, rounding=rounding, seed=3))
    if isinstance(plan, Exception):
        return {"refused": plan}
    for step in range(3, 23):
        fill(b, step)
        plan.lerp_(0.1)
    found = {"avg": values(a), "calls": plan.calls}
    other = _tensors(x, 40)
    plan.lerp_(0.25, other)
    found["other"] = values(a)
    plan.copy_()
    found["copied"] = values(a)
    plan.lerp_(0.5, other)
    found["swap"] = attempt(plan.swap_)
    return found | {"a": values(a), "b": values(b), "calls": plan.calls}


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "frozen": {"frozen": "skip"},
    "frozen copy": {"frozen": "copy"},
    "buffers": {"buffers": "average"},
    "buffers skip": {"buffers": "skip"},
    "policy": {"policy": {"cube": "skip", "mean": "average"}},
}


@case(CASES, option=OPTIONS)
def plans_of_modules(option: dict[str, Any]) -> Any:
    a, b = net(), fill(Net(), 5)
    plan = fastema.Plan(a, b, **option)
    for step in range(1, 6):
        fill(b, step)
        plan.lerp_(0.2)
    found = {"avg": values(a), "repr": repr(plan).splitlines(), "versions": versions(a)}
    plan.swap_()
    return found | {"a": values(a), "b": values(b)}


@case(CASES, code=("f64", "f32", "f16"))
def numpy_arrays(code: str) -> Any:
    a = {"x": array("x", 1, (5, 7), code), "y": array("y", 1, (40,), code)[3:36:2]}
    b = {"x": array("x", 2, (5, 7), code), "y": array("y", 2, (40,), code)[3:36:2]}
    fastema.lerp_(a, b, 0.3)
    found = {"lerp": {name: np.array(one) for name, one in a.items()}}
    fastema.swap_(a, b)
    return found | {"a": a, "b": b}


@case(CASES, which=("states", "averages"), kind=("SWA", "EMA"))
def mean_between(which: str, kind: str) -> Any:
    model = net()
    ema = fastema.SWA(model) if kind == "SWA" else fastema.EMA(model, 0.9)
    seen = []
    for step in range(1, 21):
        fill(model, step)
        ema.update()
        if step in (8, 20):
            seen.append({name: one.clone() for name, one in ema.shadow.items()})
    early, late = seen
    return attempt(lambda: fastema.mean_between(late, 20, early, 8))


@case(CASES, momentum=(0.1, None), progress=(False,))
def batch_norm(momentum: Any, progress: bool) -> Any:
    second = nn.BatchNorm1d(5, affine=False)
    model = nn.Sequential(nn.BatchNorm1d(5, momentum=momentum), nn.ReLU(), second)
    batches = [fill([torch.zeros(4, 5)], step)[0] for step in range(1, 6)]
    fastema.update_bn(batches, model, progress=progress)
    # torch's own sums may be added in another order on another processor
    rounded = {
        k: v.double().mul(1e5).round().add(0.0)
        for k, v in model.state_dict().items()
        if k[2:] not in ("weight", "bias")
    }
    return rounded | {"training": model.training}
