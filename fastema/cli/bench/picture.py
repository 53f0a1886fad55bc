"""Draw the results as bars, one for each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def title_of(head: dict[str, Any]) -> str:
    """Return the title: what was timed, on which model, in which dtypes and on which device."""
    return (
        "Time of one update of a moving average of weights\n"
        f"{head['model']}: {head['elements'] / 1e6:,.3g} million weights in {head['weights']}, "
        f"average in {head['average']}, on {head['device']}"
    )


def draw(head: dict[str, Any], found: list[Any], path: Path) -> None:
    """Draw the times of all ways that ran, and write the picture to `path`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fastema.cli.sizes import figure as shown_as
    from fastema.tracking.plots.style import EDGE, EMA, INK, STYLE

    shown = [one for one in found if one.ms is not None][::-1]
    with rc_context(STYLE | {"axes.grid": False, "ytick.color": INK}):
        figure = Figure(figsize=(7, 1.1 + 0.42 * len(shown)), dpi=150, layout="constrained")
        axes = figure.subplots()
        colors = [EMA if one.name == "fastema.EMA" else EDGE for one in shown]
        bars = axes.barh([one.name for one in shown], [one.ms for one in shown], color=colors)
        labels = [
            shown_as(one.ms) if one.ratio == 1 else f"{shown_as(one.ms)} ({one.ratio:.1f}×)"
            for one in shown
        ]
        axes.bar_label(bars, labels, padding=4)
        axes.margins(x=0.18)
        axes.set_xlabel("ms per update (and how many times fastema's)")
        axes.set_title(title_of(head), fontsize="medium", loc="left")
        figure.savefig(path)
