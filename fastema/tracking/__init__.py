"""The moving averages that people track losses with.

>>> from fastema.tracking import SimpleMovingAverage
>>> loss = SimpleMovingAverage(window_size=20)
>>> for value in (4.0, 2.0, 3.0):
...     average = loss.update(value)
>>> loss.get_average()
3.0

Names are looked up on first use: drawing needs matplotlib, writing for TensorBoard its package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastema.tracking.group import MetricAverages
    from fastema.tracking.picture import plot
    from fastema.tracking.scalar import ExponentialMovingAverage, SimpleMovingAverage
    from fastema.tracking.smoother import MetricSmoother
    from fastema.tracking.tensorboard import TensorBoardWriter

__all__ = [
    "ExponentialMovingAverage",
    "MetricAverages",
    "MetricSmoother",
    "SimpleMovingAverage",
    "TensorBoardWriter",
    "plot",
]

_HOMES = {
    "ExponentialMovingAverage": "scalar",
    "MetricAverages": "group",
    "MetricSmoother": "smoother",
    "SimpleMovingAverage": "scalar",
    "TensorBoardWriter": "tensorboard",
    "plot": "picture",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastema.tracking' has no attribute {name!r}")
    value = getattr(import_module(f"fastema.tracking.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
