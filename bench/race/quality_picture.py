"""Draw the picture of the quality question: change against the raw weights, for each seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.race.report import Row
from fastema.tracking.plots import style as plots
from fastema.tracking.plots.style import EMA, GREY, INK, RAW, SMA

COLOURS = {"EMA": EMA, "SWA": RAW, "SMA": SMA}
STYLE: Any = {**plots.STYLE, "ytick.color": INK, "axes.grid.axis": "x"}


def format_signed(number: float, places: int) -> str:
    """Format a number with its sign, and zero without a sign."""
    text = f"{number:+.{places}f}"
    return text if float(text) else text[1:]


def _panel(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    """Draw changes against raw: a point per seed, the change of the mean, and its interval."""
    height, ticks, labels = 0.0, [], []
    right_of = axes.get_yaxis_transform()  # x in shares of the axes
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        (raw, *averages) = (row for row in rows if row["schedule"] == schedule)
        scale = {"transform": right_of, "va": "center"}
        text = f"{schedule} learning rate; raw: {raw['mean']:.4g}"
        axes.text(0.0, height + 0.62, text, fontsize=9, color=GREY, **scale)
        axes.plot([0.0, 0.0], [height + 0.4, height + 0.6 - len(averages)], color=INK, lw=1)
        for row in averages:
            colour = COLOURS[row["weights"]]
            change, *interval = row["change_percent"]
            points = 100.0 * (np.array(row["scores"]) / np.array(raw["scores"]) - 1.0)
            bar = {"lw": 9, "alpha": 0.25, "solid_capstyle": "butt"}
            axes.plot(interval, [height] * 2, color=colour, **bar)
            axes.scatter(points, [height] * len(points), s=13, color=colour, alpha=0.5, lw=0)
            axes.scatter(change, height, s=70, color=colour, lw=0, zorder=3)
            shown = f"{format_signed(change, 1)} %"
            axes.text(1.02, height, shown, color=colour, fontweight="bold", **scale)
            ticks.append(height)
            labels.append(row["weights"])
            height -= 1.0
        height -= 0.8
    axes.set_yticks(ticks, labels)
    axes.set_ylim(min(ticks) - 0.7, 1.0)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11, pad=8)
    axes.set_xlabel("←  better      change against raw, %      worse  →", fontsize=9)


def draw(rows: Sequence[Row], header: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each metric of each task, and write the picture to `path`."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.figures.get("same_runs"):
            panels.setdefault(f"{row['task'].capitalize()}: {row['metric']}", []).append(row)
    seeds = len(next(iter(panels.values()))[0]["scores"])
    with rc_context(STYLE):
        figure = Figure(figsize=(11.5, 8.2), dpi=150)
        grid = figure.subplots(2, len(panels) // 2)
        figure.subplots_adjust(
            left=0.065, right=0.925, top=0.83, bottom=0.115, hspace=0.42, wspace=0.34
        )
        for axes, (title, those) in zip(grid.flat, panels.items(), strict=True):
            _panel(axes, title, those)
        head = "What averaging the weights does to the test error"
        figure.text(0.03, 0.955, head, fontsize=18, fontweight="bold", va="center")
        about = (
            f"Small points: averaged against raw weights of one run, for each of {seeds} seeds. "
            "Large points and bars: the change of the mean, its 95 % interval."
        )
        figure.text(0.03, 0.905, about, color=GREY, va="center")
        foot = (
            f"{header['command']}, {header['date_utc'][:10]}. Small networks on data that ships "
            "with scikit-learn; learning rates chosen for the raw weights, on other seeds. Scales "
            "differ between panels."
        )
        figure.text(0.03, 0.025, foot, color=GREY, fontsize=8.5, va="center")
        figure.savefig(path)
