"""Moving averages of losses and other metrics.

>>> from fastema.tracking import SimpleMovingAverage
>>> loss = SimpleMovingAverage(window_size=20)
>>> for value in (4.0, 2.0, 3.0):
...     average = loss.update(value)
>>> loss.get_average()
3.0

Names are imported on first use. :func:`plot` needs matplotlib, :class:`TensorBoardWriter` the
tensorboard package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastema.lazy import lazy_names

if TYPE_CHECKING:
    from fastema.tracking.exponential import ExponentialMovingAverage
    from fastema.tracking.group import MetricAverages
    from fastema.tracking.plots import plot
    from fastema.tracking.simple import SimpleMovingAverage
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
    "ExponentialMovingAverage": "fastema.tracking.exponential",
    "MetricAverages": "fastema.tracking.group",
    "MetricSmoother": "fastema.tracking.smoother",
    "SimpleMovingAverage": "fastema.tracking.simple",
    "TensorBoardWriter": "fastema.tracking.tensorboard",
    "plot": "fastema.tracking.plots",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
