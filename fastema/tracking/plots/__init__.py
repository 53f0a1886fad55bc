"""Plots of training runs; matplotlib is imported on the first call."""

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

    A long curve is reduced to the minimum and maximum of each of 2,000 segments, so no spike is
    lost. At a NaN or an infinity the line has a gap and the panel a mark. The figure is created
    without pyplot: it need not be closed, and no display is needed.

    Parameters
    ----------
    history : object
        One of: the result of Keras' ``fit()``, or a Keras model; a fastema callback or
        `MetricSmoother` with ``record=True``; Hugging Face's ``log_history``, state or Trainer; a
        mapping of names to numbers or curves (`fastema.tracking.logs.read`); a data frame;
        numbers; the path of a CSV, JSON or event file, or of a TensorBoard folder. Averages in the
        history (``loss_raw``, ``loss_sma``, ``loss_ema`` of ``loss``) are drawn unchanged. Other
        averages are computed here, if the metric has at least three times as many points as the
        average covers.
    metrics : str or sequence of str, optional
        Metrics to draw; by default all except step counters, times and learning rates.
    window_size : int or sequence of int, optional
        Windows of the simple moving averages, 20 by default; None to draw none.
    decay : float or sequence of float, optional
        Decays of the exponential moving averages, 0.9 by default; None to draw none.
    debias : bool
        See `ExponentialMovingAverage`; False by default.
    raw : bool
        Also draw the raw numbers; True by default.
    log : bool or "auto"
        Use a logarithmic scale. ``"auto"``, the default, does so if all numbers are positive and
        the largest is at least 30 times the smallest.
    title : str, optional
        Title above all panels.
    ax : matplotlib Axes, optional
        Axes to draw a single metric into; the rest of its figure is unchanged.
    out : path, optional
        File to write, with the suffix of a format: png, svg, pdf.

    Returns
    -------
    matplotlib.figure.Figure
        The figure, or the figure of ``ax``.

    Raises
    ------
    ArgumentError
        If the history contains no numbers or lacks a metric, or ``ax`` is passed for several
        metrics.
    """
    from fastema.tracking.plots.panels import averages, panels
    from fastema.tracking.plots.picture import draw

    asked = averages(window_size, decay, debias=debias)
    found = panels(history, metrics, averages=asked, raw=raw)
    return draw(found, log=log, title=title, ax=ax, out=out)
