"""Averages of a model's weights: update them, apply them for evaluation, restore the weights."""

from fastema.average.average import Average
from fastema.average.drift import Drift
from fastema.average.ema import EMA
from fastema.average.offload import OffloadedEMA, OffloadStats
from fastema.average.options import AverageOptions
from fastema.average.power import PowerEMA
from fastema.average.sma import SMA
from fastema.average.swa import SWA

__all__ = [
    "EMA",
    "SMA",
    "SWA",
    "Average",
    "AverageOptions",
    "Drift",
    "OffloadStats",
    "OffloadedEMA",
    "PowerEMA",
]
