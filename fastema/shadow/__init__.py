"""Averages of a model's weights: update them, apply them for evaluation, restore the weights."""

from fastema.shadow.average import Average
from fastema.shadow.drift import Drift
from fastema.shadow.ema import EMA
from fastema.shadow.offload import OffloadedEMA, OffloadStats
from fastema.shadow.power import PowerEMA
from fastema.shadow.sma import SMA
from fastema.shadow.swa import SWA

__all__ = ["EMA", "SMA", "SWA", "Average", "Drift", "OffloadStats", "OffloadedEMA", "PowerEMA"]
