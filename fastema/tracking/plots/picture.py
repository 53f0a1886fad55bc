"""Drawing of panels: raw numbers thin and pale, their averages on top."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from fastema.errors import ArgumentError
from fastema.tracking.logs.table import Curve
from fastema.tracking.plots.panels import Kind, Line, Panel, last_finite
from fastema.tracking.plots.style import EMA, GREY, INK, RAW, REPORTED, SMA, STYLE

__all__ = ["Log", "draw", "heights_of", "label_end", "spread_labels", "write_title"]

Log = bool | Literal["auto"]

_MOST_PANELS: Final = 24
_BUCKETS: Final = 2_000  # segments per curve; a panel is a few hundred pixels wide
_LOG_SPAN: Final = 30.0  # ratio of the largest to the smallest value
_MOST_LABELLED: Final = 1e3  # logarithmic scales with a larger ratio have one label per decade
_LABEL_POINTS: Final = 27.0  # height of the two-line label of a curve

# All in inches.
_WIDE: Final = (7.4, 4.0)  # a single panel
_SMALL: Final = (4.5, 2.7)  # one of several panels
_LEFT: Final = 0.85
_LABELS: Final = 1.15  # width of the labels right of a panel
_ABOVE: Final = 0.55
_BELOW: Final = 0.65
_TITLE: Final = 0.5


class _Style(NamedTuple):
    color: str
    width: float
    label_color: str
    order: float


_LOOKS: Final[dict[Kind, list[_Style]]] = {
    "raw": [_Style(f"{RAW}73", 0.8, RAW, 2.0)],
    "reported": [_Style(REPORTED, 1.8, REPORTED, 2.4)],
    # The SMA is thinner and on top, since the two are close to each other.
    "sma": [_Style(color, 1.2, color, 2.8) for color in (SMA, "#0f8563", "#2fa583")],
    "ema": [_Style(color, 2.4, color, 2.6) for color in (EMA, "#1f6fc4", "#5090dc")],
}
_ALONE: Final = _Style(INK, 1.6, INK, 2.0)
_SPARSE: Final = 100  # a line with fewer points is drawn thicker
_CROWDED: Final = 400  # a single line with more points is drawn thinner


def draw(
    found: Sequence[Panel],
    *,
    log: Log = "auto",
    title: str | None = None,
    ax: Axes | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw panels and return the figure; see `fastema.tracking.plot` for the parameters."""
    if ax is not None:
        if len(found) > 1:
            names = ", ".join(panel.name for panel in found)
            raise ArgumentError(f"ax= has room for one metric; select one with metrics=: {names}")
        within = ax.figure
        figure = within if isinstance(within, Figure) else within.figure
        _draw_panel(ax, found[0], log)
        if title is not None:
            ax.set_title(title, loc="left", pad=24)
    else:
        with matplotlib.rc_context(STYLE):
            figure = _figure(found, log, title)
    if out is not None:
        figure.savefig(out)
    return figure


def _figure(found: Sequence[Panel], log: Log, title: str | None) -> Figure:
    shown = found[:_MOST_PANELS]
    columns = 1 if len(shown) == 1 else 2 if len(shown) <= 4 else 3
    rows = math.ceil(len(shown) / columns)
    width, height = _WIDE if columns == 1 else _SMALL
    top = _TITLE if title else 0.0
    note = 0.25 if len(shown) < len(found) else 0.0
    across, down = _LEFT + width + _LABELS, _ABOVE + height + _BELOW
    size = (columns * across, rows * down + top + note)
    figure = Figure(figsize=size, dpi=150)
    FigureCanvasAgg(figure)  # measures text without a full draw
    for place, panel in enumerate(shown):
        row, column = divmod(place, columns)
        left = column * across + _LEFT
        bottom = size[1] - top - (row + 1) * down + _BELOW
        box = (left / size[0], bottom / size[1], width / size[0], height / size[1])
        _draw_panel(figure.add_axes(box), panel, log)
    margin = 0.3 / size[0]
    if title:
        figure.text(
            margin, 1.0 - 0.38 / size[1], title, fontsize=15, fontweight="bold", va="center"
        )
    if note:
        figure.text(
            margin,
            0.2 / size[1],
            f"and {len(found) - len(shown)} more metrics: choose among them by name",
            color=GREY,
            fontsize=9,
        )
    # Create the ticks now, within the style context: matplotlib creates them on first use.
    figure.draw_without_rendering()
    return figure


def _draw_panel(axes: Axes, panel: Panel, log: Log) -> None:
    alone = len(panel.lines) == 1
    looks = {kind: itertools.cycle(rows) for kind, rows in _LOOKS.items()}
    drawn: list[tuple[Line, _Style]] = []
    for line in panel.lines:
        look = next(looks[line.kind])
        if line.kind == "raw" and len(line.curve.values) < _SPARSE:
            look = look._replace(width=1.4)
        if alone:
            crowded = len(line.curve.values) > _CROWDED
            look = _ALONE._replace(width=0.8 if crowded else _ALONE.width)
        drawn.append((line, look))
        _draw_curve(axes, line.curve, look)
    remarks = [panel.remark] if panel.remark else []
    if _wants_log(panel, log):
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        subs = (1, 2, 5) if top < _MOST_LABELLED * bottom else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        remarks.append("log scale")
    missing = _mark_nonfinite(axes, panel.lines[0].curve)
    if missing:
        remarks.append(f"{missing:,} not finite")
    axes.margins(x=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _format_step(step)))
    axes.set_xlabel(panel.axis)
    bold, grey = write_title(axes, panel.name, " · ".join(remarks))
    wide = sum(text.get_window_extent().width for text in (bold, grey)) / axes.figure.dpi
    room = axes.get_window_extent().width / axes.figure.dpi + _LABELS - 0.2
    for text in (bold, grey):
        text.set_fontsize(float(text.get_fontsize()) * min(1.0, room / wide))
    _label_ends(axes, drawn, named=not alone)


def write_title(
    axes: Axes, title: str, remark: str, *, fontsize: float = 9, pad: float = 10
) -> tuple[Text, Text]:
    """Write a bold title and a gray remark after it, and return both texts."""
    bold = axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=pad)
    grey = axes.annotate(
        remark,
        xy=(1, 0),
        xycoords=bold,
        xytext=(8, 0),
        textcoords="offset points",
        fontsize=fontsize,
        color=GREY,
        va="bottom",
        annotation_clip=False,
    )
    return bold, grey


def _draw_curve(axes: Axes, curve: Curve, look: _Style) -> None:
    steps, values = thin_curve(curve)
    axes.plot(
        steps,
        values,
        color=look.color,
        linewidth=look.width,
        zorder=look.order,
        solid_capstyle="round",
        solid_joinstyle="round",
    )
    # A line needs two points: draw a dot for a single point between gaps.
    finite = np.isfinite(np.concatenate([[np.nan], values, [np.nan]]))
    alone = finite[1:-1] & ~finite[:-2] & ~finite[2:]
    axes.plot(
        steps[alone],
        values[alone],
        "o",
        color=look.color,
        zorder=look.order,
        markersize=2.0 + look.width,
        markeredgewidth=0,
    )


def thin_curve(curve: Curve, buckets: int = _BUCKETS) -> tuple[NDArray[np.float64], ...]:
    """Return the steps and values of a curve, reduced to the extremes of each segment.

    The first and last point are kept, and a short curve keeps all points. An infinity becomes NaN,
    a gap.
    """
    steps = curve.steps.astype(np.float64)
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    size = -(-len(values) // buckets)  # points per segment
    if size <= 2:
        return steps, values
    # Pad to a whole number of segments with NaN, which is never an extreme.
    padded = np.full(-(-len(values) // size) * size, np.nan)
    padded[: len(values)] = values
    rows = padded.reshape(-1, size)
    least = np.where(np.isnan(rows), np.inf, rows).argmin(axis=1)
    greatest = np.where(np.isnan(rows), -np.inf, rows).argmax(axis=1)
    pair = np.sort(np.stack([least, greatest], axis=1), axis=1)
    kept = (pair + size * np.arange(len(rows))[:, None]).ravel()
    kept = np.unique(np.concatenate([[0], kept, [len(values) - 1]]))
    return steps[kept], values[kept]


def _wants_log(panel: Panel, log: Log) -> bool:
    values = np.concatenate([line.curve.values for line in panel.lines])
    values = values[np.isfinite(values)]
    if log is False or not (values > 0.0).any():
        return False
    least, greatest = float(values.min()), float(values.max())
    return log is True or (least > 0.0 and greatest >= _LOG_SPAN * least)


def _mark_nonfinite(axes: Axes, curve: Curve) -> int:
    """Draw a triangle at the top for each value that is not finite, and return their number."""
    places = curve.steps[~np.isfinite(curve.values)]
    if len(places):
        shown = places[:: -(-len(places) // _BUCKETS)]
        axes.plot(
            shown,
            np.full(len(shown), 0.985),
            transform=blended_transform_factory(axes.transData, axes.transAxes),
            color=REPORTED,
            linestyle="none",
            marker="v",
            markersize=4.5,
            markeredgewidth=0,
            zorder=3.0,
            clip_on=False,
        )
    return len(places)


def _label_ends(axes: Axes, drawn: Iterable[tuple[Line, _Style]], *, named: bool) -> None:
    """Label the end of each curve with its name and last value, without overlaps."""
    tall = axes.get_window_extent().height * 72.0 / axes.figure.dpi
    ends = []
    for line, look in drawn:
        value = last_finite(line.curve.values)
        if math.isfinite(value):
            name = f"{line.label}\n" if named else ""
            (height,) = heights_of(axes, [value])
            ends.append((height, f"{name}{value:.4g}", look.label_color))
    ends.sort()
    heights = spread_labels([height for height, _, _ in ends], _LABEL_POINTS / tall)
    for height, (_, text, color) in zip(heights, ends, strict=True):
        label_end(axes, text, height, color, fontsize=9, linespacing=1.1)


def label_end(axes: Axes, text: str, height: float, color: str, **style: Any) -> None:
    """Write text right of the axes, at ``height`` as a fraction of their height."""
    axes.annotate(
        text,
        xy=(1.0, height),
        xycoords="axes fraction",
        xytext=(9, 0),
        textcoords="offset points",
        color=color,
        fontweight="bold",
        va="center",
        annotation_clip=False,
        **style,
    )


def heights_of(axes: Axes, values: Iterable[float]) -> list[float]:
    """Return the heights of values, as fractions of the height of the axes."""
    axes.get_ylim()  # updates the limits, which the transform below does not
    to_fraction = axes.transData + axes.transAxes.inverted()
    return [float(to_fraction.transform((1.0, value))[1]) for value in values]


def spread_labels(heights: Sequence[float], apart: float) -> list[float]:
    """Return sorted heights, moved minimally to be `apart` and, if possible, within [0, 1]."""
    # Center each group on the mean of its members' heights, and merge groups that touch.
    groups: list[list[float]] = []

    def bottom(group: list[float]) -> float:
        wide = (len(group) - 1) * apart
        lowest = sum(group) / len(group) - wide / 2.0
        return max(min(lowest, 1.0 - apart / 2.0 - wide), apart / 2.0)

    for height in heights:
        groups.append([height])
        while len(groups) > 1 and bottom(groups[-1]) < bottom(groups[-2]) + apart * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    return [bottom(group) + place * apart for group in groups for place in range(len(group))]


def _format_step(step: float) -> str:
    """Return a step in a short form: 500, 20k, 1.5M."""
    for limit, unit, name in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(step) >= limit:
            return f"{step / unit:g}{name}"
    return f"{step:g}"
