"""Summarize durations."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any


def spread(durations: Sequence[float]) -> tuple[float, float]:
    """Return the 20th and the 80th percentile, linearly interpolated."""
    if len(durations) == 1:
        return durations[0], durations[0]
    p20, *_, p80 = quantiles(durations, n=5, method="inclusive")
    return p20, p80


def summarize_times(durations: Sequence[float], unit: str = "ms", calls: int = 1) -> dict[str, Any]:
    """Return the number of rounds, and the median and spread of the time of one call.

    Parameters
    ----------
    durations
        Times in seconds, one per round.
    unit
        ``"ms"`` or ``"us"``: unit of the result and name of its figures.
    calls
        Number of calls in each duration.
    """
    scale = {"ms": 1e3, "us": 1e6}[unit] / calls
    return {
        "rounds": len(durations),
        unit: median(durations) * scale,
        f"spread_{unit}": [one * scale for one in spread(durations)],
    }
