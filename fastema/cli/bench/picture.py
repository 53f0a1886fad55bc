"""Draw the results as bars, one for each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(head: dict[str, Any], found: list[Any], path: Path) -> None:
    """Draw the times of all ways that ran, and write the picture to `path`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fastema.cli.sizes import figure as shown_as
    from fastema.tracking.plots.style import EDGE, EMA, INK, STYLE

    shown = [one for one in found if one.ms is not None][::-1]
    with rc_context(STYLE | {"axes.grid": False, "ytick.color": INK}):
        figure = Figure(figsize=(7, 0.9 + 0.42 * len(shown)), dpi=150, layout="constrained")
        axes = figure.subplots()
        colors = [EMA if one.name == "fastema.EMA" else EDGE for one in shown]
        bars = axes.barh([one.name for one in shown], [one.ms for one in shown], color=colors)
        labels = [
            shown_as(one.ms) if one.ratio == 1 else f"{shown_as(one.ms)} ({one.ratio:.1f}×)"
            for one in shown
        ]
        axes.bar_label(bars, labels, padding=4)
        axes.margins(x=0.18)
        axes.set_xlabel("ms per update of the average")
        axes.set_title(
            f"{head['model']}: {head['elements'] / 1e6:,.3g} million weights, {head['weights']}, "
            f"average {head['average']}",
            fontsize="medium",
        )
        figure.savefig(path)
