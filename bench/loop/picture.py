"""Draw the time of an update in a training loop over the size of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.loop.race import CONTESTANTS
from bench.race.report import Row
from fastema.tracking.plots import style

COLORS = dict(zip(CONTESTANTS, (style.EMA, style.RAW, style.SMA, style.REPORTED), strict=True))
STYLE: Any = {**style.STYLE, "axes.grid.axis": "both"}
MARKERS = dict(zip(CONTESTANTS, "osD^", strict=True))


def _draw_panel(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    for name, color in COLORS.items():
        own = [row for row in rows if row.column == name]
        if own:
            thick = {"lw": 2.4 if name == next(iter(COLORS)) else 1.4, "marker": MARKERS[name]}
            millions = [row["n_elements"] / 1e6 for row in own]
            axes.plot(millions, [row["us"] for row in own], color=color, ms=5, label=name, **thick)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10, pad=8)


def draw(rows: Sequence[Row], header: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each pair of dtypes and number of threads, and write the picture to `path`.

    Dtypes stand side by side, numbers of threads one below the other.
    """
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.column in COLORS:
            panels.setdefault(row.table, []).append(row)
    threads = list(dict.fromkeys(title.rpartition(", ")[2] for title in panels))
    dtypes = list(dict.fromkeys(title.rpartition(", ")[0] for title in panels))
    with rc_context(STYLE):
        figure = Figure(figsize=(11.5, 1.6 + 3.1 * len(threads)), dpi=150)
        height = figure.get_figheight()
        grid = figure.subplots(len(threads), len(dtypes), sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(left=0.075, right=0.985, top=1 - 1.3 / height, bottom=0.85 / height)
        figure.subplots_adjust(hspace=0.26, wspace=0.08)
        for row, count in enumerate(threads):
            for column, pair in enumerate(dtypes):
                axes = grid[row, column]
                _draw_panel(axes, f"{pair}, {count}", panels.get(f"{pair}, {count}", []))
            grid[row, 0].set_ylabel("µs per update")
        for axes in grid[-1]:
            axes.set_xlabel("million weights")
        top = 1 - 0.36 / height
        head = "An update right after the optimizer's step"
        figure.text(0.03, top, head, fontsize=18, fontweight="bold", va="center")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="center left",
            bbox_to_anchor=(0.02, 1 - 0.78 / height),
            ncols=len(labels),
            frameon=False,
            fontsize=11,
            labelcolor=style.INK,
        )
        foot = f"{header['command']}, {header['date_utc'][:10]}, {header['cpu']}. Lower is faster. "
        foot += "bf16 averages: fastema rounds stochastically, the others to nearest."
        figure.text(0.03, 0.2 / height, foot, color=style.GREY, fontsize=8.5, va="center")
        figure.savefig(path)
