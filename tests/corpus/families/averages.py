"""Every average over every pair of dtypes: values after 50 steps."""

from functools import partial
from typing import Any

from torch import nn

import fastema
from fastema import rules

from ..cases import Cases, case
from ..weights import TORCH, Net, fill, net, read, train

CASES: Cases = {}

KINDS = {
    "EMA": partial(fastema.EMA, decay=0.9),
    "EMA debiased": partial(fastema.EMA, decay=0.9, zero_debias=True),
    "EMA of two": partial(fastema.EMA, decay=(0.75, rules.warmup(0.99))),
    "SWA": fastema.SWA,
    "SMA": partial(fastema.SMA, window=7),
}
FORMATS: dict[str, dict[str, Any]] = {
    "none": {},
    "f64": {"shadow_dtype": "float64"},
    "f32": {"shadow_dtype": "float32"},
    "f16": {"shadow_dtype": "float16"},
    "f16 nearest": {"shadow_dtype": "float16", "rounding": "nearest"},
    "bf16": {"shadow_dtype": "bfloat16", "seed": 7},
    "bf16 nearest": {"shadow_dtype": "bfloat16", "rounding": "nearest"},
    "bf16+16": {"shadow_dtype": "bf16+16"},
}


def _tolerance(kind: Any, **others: Any) -> float:
    """Return the tolerance of the weights that pow gives, whose last bit may differ."""
    return 1e-11 if kind is KINDS["EMA debiased"] else 0.0


@case(CASES, rtol=_tolerance, kind=KINDS, weights=TORCH, average=FORMATS)
def values_after_50_steps(kind: Any, weights: Any, average: Any) -> Any:
    code = next(code for code, dtype in TORCH.items() if dtype is weights)
    model = net(code)
    ema = kind(model, **average)
    train(model, ema)
    return read(ema)


@case(CASES, rtol=1e-11, weights=TORCH, average=("none", "f32"))
def power_after_50_steps(weights: Any, average: str) -> Any:
    code = next(code for code, dtype in TORCH.items() if dtype is weights)
    model = net(code)
    ema = fastema.PowerEMA(model, sigma_rels=(0.05, 0.2), **FORMATS[average])
    train(model, ema)
    return read(ema)


@case(CASES, ring=(None, "float32", "float16", "bfloat16"), weights=("f32", "bf16"))
def rings(ring: Any, weights: str) -> Any:
    model = net(weights)
    ema = fastema.SMA(model, window=5, ring_dtype=ring)
    train(model, ema, steps=range(1, 4))
    early = read(ema)["shadows"]
    train(model, ema)
    return {"early": early, **read(ema)}


@case(CASES)
def random_bits_depend_on_seed_and_step() -> Any:
    found = {}
    for seed in (0, 1, 2**40):
        model = net("bf16")
        ema = fastema.EMA(model, decay=0.99, seed=seed)
        for step in (1, 2, 3):
            fill(model, step)
            ema.update()
            found[f"seed {seed} step {step}"] = {k: v.clone() for k, v in ema.shadow.items()}
    return found


@case(CASES, kind=("EMA", "SWA", "SMA"))
def lists_dicts_and_single_tensors(kind: str) -> Any:
    found = {}
    for name, make in {
        "dict": lambda one: dict(one.named_parameters()),
        "list": lambda one: [p for p in one.parameters() if p.requires_grad],
        "tensor": lambda one: one.cube,
        "nested": lambda one: {"a": [one.cube, (one.long,)], "b": {"c": one.number}},
        "modules": lambda one: [nn.ModuleDict({"a": one}), nn.ModuleDict({"b": fill(Net(), 99)})],
    }.items():
        model = net()
        ema = KINDS[kind](make(model))
        train(model, ema)
        found[name] = read(ema)
    return found
