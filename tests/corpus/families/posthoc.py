"""Snapshots of power-function averages, and averages synthesized from them."""

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # gives NumPy the name bfloat16
import numpy as np
import torch

import fastema
from fastema import posthoc

from ..cases import Cases, case
from ..record import attempt
from ..weights import fill, net

CASES: Cases = {}


def _train(folder: str, code: str = "f32", **options: Any) -> Any:
    model = net(code)
    ema = fastema.PowerEMA(model, sigma_rels=(0.05, 0.1), **options)
    for step in range(1, 51):
        fill(model, step)
        ema.update()
        if step % 10 == 0:
            posthoc.save_snapshot(ema, folder)
    return model


def _shadow(model: Any) -> dict[str, Any]:
    return dict(fastema.EMA(model).shadow)


TARGETS: dict[str, dict[str, Any]] = {
    "sigma_rel 0.15": {"sigma_rel": 0.15},
    "sigma_rel 0.08 at 30": {"sigma_rel": 0.08, "step": 30},
    "half_life": {"half_life": 5.0},
    "float64": {"sigma_rel": 0.1, "dtype": "float64"},
    "bfloat16": {"sigma_rel": 0.1, "dtype": "bfloat16"},
}


@case(CASES, rtol=1e-5, target=TARGETS)
def synthesized(target: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model = _train(folder)
        found = posthoc.synthesize(folder, **target)
        into = {name: torch.zeros_like(one) for name, one in _shadow(model).items()}
        outcome = attempt(
            lambda: posthoc.synthesize(folder, **(target | {"dtype": None}), into=into).step
        )
        return {
            "tensors": found.tensors,
            "error": found.error,
            "coefficients": {path.name: value for path, value in found.coefficients.items()},
            "step": found.step,
            "sum": round(sum(found.coefficients.values()), 9),
            "into": {"outcome": outcome, **into},
        }


@case(CASES)
def snapshots() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        _train(folder, update_every=2, start_after=4)
        found = posthoc.find_snapshots(folder)
        return {
            "files": sorted(one.name for one in Path(folder).iterdir()),
            "found": [
                {"name": one.path.name, "step": one.step, "start": one.start, "every": one.every}
                for one in found
            ],
        }


@case(CASES, rtol=1e-11, bad=("empty", "both", "neither", "late", "average", "negative"))
def refusals(bad: str) -> Any:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as empty:
        if bad != "empty":
            _train(folder)
        tries = {
            "empty": lambda: posthoc.synthesize(empty, sigma_rel=0.1),
            "both": lambda: posthoc.synthesize(folder, sigma_rel=0.1, half_life=3),
            "neither": lambda: posthoc.synthesize(folder),
            "late": lambda: posthoc.synthesize(folder, sigma_rel=0.1, step=1000),
            "average": lambda: posthoc.save_snapshot(fastema.EMA(net()), folder),
            "negative": lambda: posthoc.synthesize(folder, sigma_rel=-1.0),
        }
        return {"outcome": attempt(tries[bad])}


@case(CASES, rtol=1e-11)
def numpy_weights() -> Any:
    weights = {"w": np.zeros(5), "v": np.zeros((2, 3), np.float32)}
    ema = fastema.PowerEMA(weights, sigma_rels=0.1)
    for step in range(1, 31):
        weights["w"] += step * np.arange(1, 6)
        weights["v"] += np.arange(1, 7, dtype=np.float32).reshape(2, 3)
        ema.update()
    return dict(ema.shadow)
