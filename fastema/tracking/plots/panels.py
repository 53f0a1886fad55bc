"""Panels of a plot: the recorded or computed lines of each metric."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.errors import ArgumentError, format_problems
from fastema.tracking import logs
from fastema.tracking.exponential import ExponentialMovingAverage
from fastema.tracking.logs import table
from fastema.tracking.logs.table import Column, Curve, Table
from fastema.tracking.scalar import MovingAverage, OnNonFinite
from fastema.tracking.simple import SimpleMovingAverage

Kind = Literal["raw", "reported", "sma", "ema"]

_LEAST: Final = 3
"""Minimum length of a curve, in horizons of an average, for that average to be drawn."""


class Line(NamedTuple):
    """A curve and the label at its end."""

    kind: Kind
    label: str
    curve: Curve


class Panel(NamedTuple):
    """The name, x axis, lines and remark of one metric."""

    name: str
    axis: str  # what the steps count
    lines: list[Line]
    remark: str = ""


class AveragedLine(NamedTuple):
    """A moving average to compute and draw."""

    kind: Literal["sma", "ema"]
    setting: str  # the window or the decay, in digits
    horizon: float  # number of values that it covers
    make: Callable[[], MovingAverage]

    @property
    def label(self) -> str:
        """Label of the line, such as ``SMA 20`` or ``EMA 0.9``."""
        return f"{self.kind.upper()} {self.setting}"


class MetricCurves(NamedTuple):
    """The curves of a history in one format, whatever its source."""

    curves: dict[str, Curve]
    axis: str = "step"
    settings: Mapping[str, str] = {}  # of the averages in the history, by kind


def averages(
    window_size: int | Iterable[int] | None,
    decay: float | Iterable[float] | None,
    *,
    debias: bool = False,
    on_nonfinite: OnNonFinite = "show",
) -> list[AveragedLine]:
    """Return an average per window and per decay; raise an ArgumentError for an invalid one."""
    found = []
    for size in _as_list(window_size):
        make_sma = partial(SimpleMovingAverage, size, on_nonfinite=on_nonfinite)
        make_sma()  # validates the window
        found.append(AveragedLine("sma", str(size), float(size), make_sma))
    for weight in _as_list(decay):
        make_ema = partial(ExponentialMovingAverage, weight, debias, on_nonfinite=on_nonfinite)
        make_ema()
        horizon = float(round(1.0 / (1.0 - weight)))
        found.append(AveragedLine("ema", repr(float(weight)), horizon, make_ema))
    return found


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, Iterable) else [given]


def panels(
    history: object,
    metrics: str | Sequence[str] | None = None,
    *,
    averages: Sequence[AveragedLine],
    raw: bool = True,
) -> list[Panel]:
    """Return one panel per metric. `averages` are computed if the history has none for it."""
    found = _read_history(history)
    found = found._replace(curves={n: c for n, c in found.curves.items() if len(c.values)})
    names = _select_metrics(found.curves, [metrics] if isinstance(metrics, str) else metrics)
    return [_make_panel(name, found, averages, raw=raw) for name in names]


def _select_metrics(curves: Mapping[str, Curve], chosen: Sequence[str] | None) -> list[str]:
    """Return the names of the metrics to draw, without suffixes such as ``_raw`` or ``_ema``."""
    bases = {name: table.find_role(name, curves).metric for name in curves}
    if chosen is None:
        # A history of one epoch has too few numbers for metrics(): draw all its curves.
        names = list(dict.fromkeys(bases[name] for name in table.metrics(curves) or curves))
        if not names:
            raise ArgumentError("the history is empty: nothing has been recorded in it yet")
        return names
    known = dict.fromkeys((*bases.values(), *curves))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ArgumentError(f"no metric {', '.join(unknown)}; there are\n{format_problems(known)}")
    return list(dict.fromkeys(chosen))


def _make_panel(
    name: str, found: MetricCurves, averages: Sequence[AveragedLine], *, raw: bool
) -> Panel:
    curves = found.curves
    own = curves.get(f"{name}_raw")
    lines = []
    if own is not None and table.find_role(f"{name}_raw", curves).metric == name:
        lines.append(Line("raw", "raw", own))
        if name in curves:
            lines.append(Line("reported", "as reported", curves[name]))
    else:
        lines.append(Line("raw", "raw", curves[name]))
    held = _find_recorded_averages(name, found)
    if held:
        shown = [line for line in lines if raw or line.kind != "raw"]
        return Panel(name, found.axis, shown + held)
    curve = lines[0].curve
    series = [(average, average.make().update_many(curve.values)) for average in averages]
    panel = make_series_panel(name, found.axis, curve, series, raw=raw)
    return panel._replace(lines=panel.lines + lines[1:])


def make_series_panel(
    name: str,
    axis: str,
    curve: Curve,
    series: Sequence[tuple[AveragedLine, NDArray[np.float64]]],
    raw: bool = True,
    every: bool = False,
) -> Panel:
    """Return the panel of a metric with its averages.

    An average that covers more than a third of the values is left out unless ``every`` is True: it
    would stay near its initial value most of the time, and look like the metric.
    """
    lines, short = [], []
    for average, values in series:
        if every or len(values) >= _LEAST * average.horizon:
            lines.append(Line(average.kind, average.label, Curve(curve.steps, values)))
        else:
            short.append(average.label)
    remark = ""
    if short:
        few = f"too few for {', '.join(short)}" if lines else "not averaged"
        remark = f"{len(curve.values)} points, {few}"
    if raw or not lines:
        lines.insert(0, Line("raw", "raw", curve))
    return Panel(name, axis, lines, remark)


def _find_recorded_averages(name: str, found: MetricCurves) -> list[Line]:
    """Return the lines of a metric's averages that the history contains."""
    lines = []
    for other, curve in found.curves.items():
        metric, kind, setting = table.find_role(other, found.curves)
        if metric == name and (kind == "sma" or kind == "ema"):
            setting = setting or found.settings.get(kind, "")
            lines.append(Line(kind, f"{kind.upper()} {setting}".strip(), curve))
    return sorted(lines, key=lambda line: line.kind, reverse=True)


# -- histories ------------------------------------------------------------------------------------


def _read_history(history: Any) -> MetricCurves:
    if isinstance(history, (str, os.PathLike)) or hasattr(history, "readline"):
        history = logs.read_table(history)
    if isinstance(history, Table):
        step = history.step_column()
        return MetricCurves(history.curves(step), step or "row")
    if isinstance(history, Mapping):
        return _read_mapping(history)
    if hasattr(history, "columns") and hasattr(history, "iloc"):  # a data frame
        return _read_mapping({str(name): history[name] for name in history.columns}, blank_nan=True)
    state = getattr(history, "state", history)  # Hugging Face's Trainer
    history = getattr(state, "log_history", history)
    if isinstance(history, Sequence) and history and isinstance(history[0], Mapping):
        return _read_history(logs.from_rows(history, "history"))
    if hasattr(history, "history"):
        return _read_recorder(history)
    values = _values(history)
    if values is None:
        raise ArgumentError(
            f"{type(history).__name__}: expected a history: a mapping of names to numbers, what "
            "fit() of Keras returns, a callback that records, log_history of Hugging Face, a data "
            "frame, numbers, or the path of a log"
        )
    return _read_mapping({"value": values})


def _read_recorder(recorder: Any) -> MetricCurves:
    """Return the curves of an object with a ``history``: a callback, or a Keras model."""
    inner = recorder.history
    if inner is None:
        raise ArgumentError(f"{type(recorder).__name__}.history is empty: nothing recorded yet")
    if not isinstance(inner, Mapping):
        return _read_history(inner)
    columns = {n: values for n, given in inner.items() if (values := _values(given)) is not None}
    settings = {
        kind: str(value)
        for kind, attribute in (("sma", "window_size"), ("ema", "decay"))
        if (value := getattr(recorder, attribute, None)) is not None
    }
    steps = getattr(recorder, "steps", None)
    if isinstance(steps, Mapping):
        curves = {
            name: Curve(np.asarray(steps[table.find_role(name, inner).metric], np.int64), values)
            for name, values in columns.items()
        }
        return MetricCurves(curves, settings=settings)
    epochs = getattr(recorder, "epoch", None)
    if not isinstance(epochs, Sequence):
        return _read_mapping(inner)._replace(settings=settings)
    curves = {n: Curve(_at_epochs(epochs, values), values) for n, values in columns.items()}
    return MetricCurves(curves, "epoch", settings)


def _at_epochs(epochs: Sequence[int], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the epochs of ``values``, from 1; validation may run at every n-th epoch only."""
    every, rest = divmod(len(epochs), max(len(values), 1))
    if rest or not every:
        return np.arange(1, len(values) + 1)
    return np.asarray(epochs, np.int64)[every - 1 :: every] + 1


def _read_mapping(history: Mapping[Any, Any], *, blank_nan: bool = False) -> MetricCurves:
    """Return the curves of a mapping from names to numbers; a column of steps becomes the axis."""
    if history and all(isinstance(curve, Curve) for curve in history.values()):
        return MetricCurves({str(name): curve for name, curve in history.items()})
    columns = {}
    for name, given in history.items():
        values = _values(given)
        if values is not None:
            rows = np.flatnonzero(~np.isnan(values)) if blank_nan else np.arange(len(values))
            if len(rows):
                columns[str(name)] = Column(rows, values[rows])
    numbers = Table("history", columns)
    step = numbers.step_column()
    if step is None:
        return MetricCurves(
            {name: Curve(rows + 1, values) for name, (rows, values) in columns.items()}
        )
    curves = numbers.curves(step)
    del curves[step]
    return MetricCurves(curves, step)


def _values(column: Any) -> NDArray[np.float64] | None:
    """Return a one-dimensional series as float64, and None for anything else."""
    try:
        values = np.asarray(column, np.float64)
    except (TypeError, ValueError):
        return None
    return values if values.ndim == 1 else None


def last_finite(values: NDArray[np.float64]) -> float:
    """Return the last finite number, and NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan
