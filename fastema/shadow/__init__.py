"""Shadow weights: averages of a model that are kept, applied for evaluation and taken back."""

from fastema.shadow.average import Average
from fastema.shadow.ema import EMA
from fastema.shadow.offload import OffloadedEMA, OffloadStats
from fastema.shadow.power import PowerEMA
from fastema.shadow.sma import SMA
from fastema.shadow.swa import SWA
from fastema.shadow.views import Drift

__all__ = ["EMA", "SMA", "SWA", "Average", "Drift", "OffloadStats", "OffloadedEMA", "PowerEMA"]
