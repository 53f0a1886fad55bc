"""Pictures of training runs; matplotlib is imported by the call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastema.tracking.plots.picture import Log

__all__ = ["plot"]


def plot(
    history: object,
    metrics: str | Sequence[str] | None = None,
    *,
    window_size: int | Sequence[int] | None = 20,
    decay: float | Sequence[float] | None = 0.9,
    debias: bool = False,
    raw: bool = True,
    log: Log = "auto",
    title: str | None = None,
    ax: Axes | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw each metric of a training run with its moving averages, one panel per metric.

    Of a long curve, the least and the greatest value of each of 2,000 stretches are drawn: no
    spike is lost. Where a value is a NaN or infinite, the line has a gap and the panel a mark.
    The figure is made without pyplot: nothing to close, and no display is needed.

    Parameters
    ----------
    history : object
        What ``fit()`` of Keras returns, or a model of Keras; a callback of ours, or a
        `MetricSmoother`, that records; ``log_history`` of Hugging Face, its state or Trainer; a
        mapping of names to numbers, or of names to curves (`fastema.tracking.logs.read`); a data
        frame; numbers; the path of a CSV, JSON or event file, or of a folder of TensorBoard's.
        Averages that it holds (``loss_raw``, ``loss_sma``, ``loss_ema`` of ``loss``) are drawn as
        they are. Others are computed here, for metrics of at least three times the points
        that they are over.
    metrics : str or sequence of str, optional
        Which; by default all but those that count steps, tell times or learning rates.
    window_size, decay : number or sequence of numbers, optional
        Of the simple and the exponential averages; None for none.
    debias : bool
        See `ExponentialMovingAverage`.
    raw : bool
        Whether the numbers themselves are drawn too.
    log : bool or "auto"
        A logarithmic scale; ``"auto"`` where all numbers are positive and the greatest is 30
        times the least or more.
    title : str, optional
        Above all panels.
    ax : matplotlib Axes, optional
        To draw into, for a single metric; its figure is left as it is otherwise.
    out : path, optional
        File to write; its ending chooses the format: png, svg, pdf.

    Raises
    ------
    ArgumentError
        If there are no numbers in it, not the metrics asked for, or several for one ``ax``.
    """
    from fastema.tracking.plots.panels import averages, panels
    from fastema.tracking.plots.picture import draw

    asked = averages(window_size, decay, debias=debias)
    found = panels(history, metrics, averages=asked, raw=raw)
    return draw(found, log=log, title=title, ax=ax, out=out)
