"""Moving averages of model weights, in place, at the speed of memory, a whole model per call.

>>> import fastema
>>> import numpy as np
>>> weights = {"w": np.ones(3, np.float32)}
>>> ema = fastema.EMA(weights, decay=0.9)
>>> weights["w"] += 1
>>> ema.update()
>>> ema.shadow["w"]
array([1.1, 1.1, 1.1], dtype=float32)

Names are imported on first use: ``import fastema`` loads neither Numba nor any framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastema.lazy import lazy_names

if TYPE_CHECKING:
    from fastema import checkpoint, compat, distributed, errors, posthoc, rules, tracking
    from fastema import keras as keras
    from fastema import lightning as lightning
    from fastema import tensorflow as tensorflow
    from fastema import transformers as transformers
    from fastema.average import EMA, SMA, SWA, PowerEMA
    from fastema.engine.threads import get_num_threads, set_num_threads
    from fastema.plan import Plan, copy_, lerp_, mean_between, swap_
    from fastema.torch import update_bn

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "SMA",
    "SWA",
    "Plan",
    "PowerEMA",
    "__version__",
    "checkpoint",
    "compat",
    "copy_",
    "distributed",
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
    "EMA": "fastema.average",
    "SMA": "fastema.average",
    "SWA": "fastema.average",
    "Plan": "fastema.plan",
    "PowerEMA": "fastema.average",
    "copy_": "fastema.plan",
    "get_num_threads": "fastema.engine.threads",
    "lerp_": "fastema.plan",
    "mean_between": "fastema.plan",
    "set_num_threads": "fastema.engine.threads",
    "swap_": "fastema.plan",
    "update_bn": "fastema.torch",
    **{
        name: f"fastema.{name}"
        for name in (
            *("checkpoint", "compat", "distributed", "errors", "keras", "lightning", "posthoc"),
            *("rules", "tensorflow", "tracking", "transformers"),
        )
    },
}

if not TYPE_CHECKING:  # without __getattr__, a type checker reports unknown names
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
