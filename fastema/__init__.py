"""Moving averages of model weights at the speed of memory, in place, for a whole model in one call.

>>> import fastema
>>> import numpy as np
>>> weights = {"w": np.ones(3, np.float32)}
>>> ema = fastema.EMA(weights, decay=0.9)
>>> weights["w"] += 1
>>> ema.update()
>>> ema.shadow["w"]
array([1.1, 1.1, 1.1], dtype=float32)

Names are looked up on first use: importing fastema loads neither Numba nor any framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastema import compat, errors, rules, tracking
    from fastema.engine.cpu import get_num_threads, set_num_threads
    from fastema.plan import Plan, copy_, lerp_, mean_between, swap_
    from fastema.shadow import EMA, SMA, SWA, PowerEMA
    from fastema.torch import update_bn

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "SMA",
    "SWA",
    "Plan",
    "PowerEMA",
    "__version__",
    "compat",
    "copy_",
    "errors",
    "get_num_threads",
    "lerp_",
    "mean_between",
    "posthoc",
    "rules",
    "set_num_threads",
    "swap_",
    "tracking",
    "update_bn",
]

_HOMES = {
    "EMA": "fastema.shadow",
    "SMA": "fastema.shadow",
    "SWA": "fastema.shadow",
    "Plan": "fastema.plan",
    "PowerEMA": "fastema.shadow",
    "copy_": "fastema.plan",
    "get_num_threads": "fastema.engine.cpu",
    "lerp_": "fastema.plan",
    "mean_between": "fastema.plan",
    "set_num_threads": "fastema.engine.cpu",
    "swap_": "fastema.plan",
    "update_bn": "fastema.torch",
}

_ROOMS = {
    *("compat", "errors", "keras", "lightning", "posthoc", "rules", "tensorflow", "tracking"),
    "transformers",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"fastema.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastema' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
