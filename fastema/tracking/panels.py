"""What a picture of a history shows: for each metric its lines, found or computed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fastema.errors import ArgumentError, listed
from fastema.tracking import logs, table
from fastema.tracking.scalar import (
    ExponentialMovingAverage,
    MovingAverage,
    OnNonFinite,
    SimpleMovingAverage,
)
from fastema.tracking.table import Column, Curve, Table

Kind = Literal["raw", "reported", "sma", "ema"]

_LEAST: Final = 3
"""Horizons of an average in the length of a curve that is drawn averaged."""

_PART: Final = re.compile(r"(?P<base>.+)_(?P<kind>raw|sma|ema)(?:_(?P<setting>[0-9.]+))?")


class Line(NamedTuple):
    """A curve with the name that stands at its end."""

    kind: Kind
    label: str
    curve: Curve


class Panel(NamedTuple):
    """A metric."""

    name: str
    axis: str  # what the steps count
    lines: list[Line]
    remark: str = ""


class Average(NamedTuple):
    """One of the averages asked for."""

    kind: Literal["sma", "ema"]
    setting: str  # the window or the decay, in digits
    horizon: float  # values that it is over
    make: Callable[[], MovingAverage]

    @property
    def label(self) -> str:
        """``SMA 20``, ``EMA 0.9``."""
        return f"{self.kind.upper()} {self.setting}"


class Found(NamedTuple):
    """What a history holds."""

    curves: dict[str, Curve]
    axis: str = "step"
    settings: Mapping[str, str] = {}  # of the averages it holds, by kind


def averages(
    window_size: int | Iterable[int] | None,
    decay: float | Iterable[float] | None,
    *,
    debias: bool = False,
    on_nonfinite: OnNonFinite = "show",
) -> list[Average]:
    """Averages of each window and each decay given.

    Raises
    ------
    ArgumentError
        For a window or a decay that there cannot be.
    """
    found = []
    for size in _several(window_size):
        SimpleMovingAverage(size, on_nonfinite=on_nonfinite)  # refuses what cannot be
        found.append(
            Average(
                "sma",
                str(size),
                float(size),
                lambda size=size: SimpleMovingAverage(size, on_nonfinite=on_nonfinite),  # type: ignore[misc]
            )
        )
    for weight in _several(decay):
        ExponentialMovingAverage(weight, debias=debias, on_nonfinite=on_nonfinite)
        found.append(
            Average(
                "ema",
                repr(float(weight)),
                float(round(1.0 / (1.0 - weight))),
                lambda weight=weight: ExponentialMovingAverage(  # type: ignore[misc]
                    weight, debias=debias, on_nonfinite=on_nonfinite
                ),
            )
        )
    return found


def _several(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, Iterable) else [given]


def panels(
    history: object,
    metrics: str | Sequence[str] | None = None,
    *,
    averages: Sequence[Average],
    raw: bool = True,
) -> list[Panel]:
    """One panel for each metric of a history.

    Parameters
    ----------
    history : object
        Whatever `fastema.tracking.plot` takes.
    metrics : str or sequence of str, optional
        Which; all of them by default.
    averages : sequence of Average
        Computed for metrics whose averages the history does not hold.
    raw : bool
        Whether the numbers themselves are shown beside their averages.

    Raises
    ------
    ArgumentError
        If it holds no numbers, or not the metrics asked for.
    BridgeError
        If it is nothing that holds a history.
    """
    found = _found(history)
    found = found._replace(curves={n: c for n, c in found.curves.items() if len(c.values)})
    names = _names(found.curves, [metrics] if isinstance(metrics, str) else metrics)
    return [_panel(name, found, averages, raw=raw) for name in names]


def _names(curves: Mapping[str, Curve], chosen: Sequence[str] | None) -> list[str]:
    """Names of metrics without the endings of their raw values and averages."""
    if chosen is None:
        names = list(dict.fromkeys(_base(name, curves) for name in table.metrics(curves)))
        # A history of one epoch is short, but all there is.
        names = names or list(dict.fromkeys(_base(name, curves) for name in curves))
        if not names:
            raise ArgumentError("the history is empty: nothing has been recorded in it yet")
        return names
    known = dict.fromkeys((*(_base(name, curves) for name in curves), *curves))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ArgumentError(f"no metric {', '.join(unknown)}; there are\n{listed(known)}")
    return list(dict.fromkeys(chosen))


def _base(name: str, names: Iterable[str]) -> str:
    """The metric that a curve belongs to: ``loss`` for ``loss_raw`` and ``loss_ema_0.9``."""
    part = _PART.fullmatch(name)
    if part is None:
        return name
    if part["kind"] == "raw":
        return part["base"] if _related(part["base"], names) else name
    return table.averaged(name, names) or name


def _related(base: str, names: Iterable[str]) -> bool:
    """Whether there is anything besides the raw values of a metric."""
    return any(
        name == base
        or ((part := _PART.fullmatch(name)) and part["base"] == base and part["kind"] != "raw")
        for name in names
    )


def _panel(name: str, found: Found, averages: Sequence[Average], *, raw: bool) -> Panel:
    curves = found.curves
    own = curves.get(f"{name}_raw")
    lines: list[Line] = []
    if own is not None and _base(f"{name}_raw", curves) == name:
        lines.append(Line("raw", "raw", own))
        if name in curves:
            lines.append(Line("reported", "as reported", curves[name]))
    else:
        lines.append(Line("raw", "raw", curves[name]))
    held = _held(name, found)
    if held:
        shown = [line for line in lines if raw or line.kind != "raw"]
        return Panel(name, found.axis, shown + held)
    curve = lines[0].curve
    series = [(average, average.make().update_many(curve.values)) for average in averages]
    panel = of_series(name, found.axis, curve, series, raw=raw)
    return panel._replace(lines=panel.lines + lines[1:])


def of_series(
    name: str,
    axis: str,
    curve: Curve,
    series: Sequence[tuple[Average, NDArray[np.float64]]],
    *,
    raw: bool = True,
) -> Panel:
    """The panel of a metric and its averages, but for those over more than a third of the values.

    Such an average is most of the time where it began, and would be taken for the metric.
    """
    fitting = [
        (average, values) for average, values in series if len(values) >= _LEAST * average.horizon
    ]
    lines = [
        Line(average.kind, average.label, Curve(curve.steps, values)) for average, values in fitting
    ]
    if raw or not lines:
        lines.insert(0, Line("raw", "raw", curve))
    remark = ""
    if len(fitting) < len(series):
        short = [
            average.label for average, values in series if len(values) < _LEAST * average.horizon
        ]
        few = f"too few for {', '.join(short)}" if fitting else "not averaged"
        remark = f"{len(curve.values)} points, {few}"
    return Panel(name, axis, lines, remark)


def _held(name: str, found: Found) -> list[Line]:
    """The averages that the history itself holds."""
    lines = []
    for other, curve in found.curves.items():
        part = _PART.fullmatch(other)
        if part is not None and part["base"] == name and part["kind"] != "raw":
            kind = cast(Literal["sma", "ema"], part["kind"])
            setting = part["setting"] or found.settings.get(kind, "")
            lines.append(Line(kind, f"{kind.upper()} {setting}".strip(), curve))
    return sorted(lines, key=lambda line: line.kind, reverse=True)


# -- histories ------------------------------------------------------------------------------------


def _found(history: Any) -> Found:
    if isinstance(history, (str, os.PathLike)) or hasattr(history, "readline"):
        history = logs.read_table(history)
    if isinstance(history, Table):
        step = history.step_column()
        return Found(history.curves(step), step or "row")
    if isinstance(history, Mapping):
        return _of_mapping(history)
    if hasattr(history, "columns") and hasattr(history, "iloc"):  # a data frame
        return _of_mapping({str(name): history[name] for name in history.columns}, blank_nan=True)
    state = getattr(history, "state", history)  # of Hugging Face's Trainer
    if hasattr(state, "log_history"):
        history = state.log_history
    if isinstance(history, Sequence) and history and isinstance(history[0], Mapping):
        return _found(logs.from_rows(history, "history"))
    if hasattr(history, "history"):
        return _of_recorder(history)
    values = _values(history)
    if values is None:
        raise ArgumentError(
            f"{type(history).__name__}: expected a history: a mapping of names to numbers, what "
            "fit() of Keras returns, a callback that records, log_history of Hugging Face, a data "
            "frame, numbers, or the path of a log"
        )
    return Found({"value": Curve(_counted(values), values)})


def _of_recorder(recorder: Any) -> Found:
    """A callback, or what else has a history: Keras' own, ours, a Keras model."""
    inner = recorder.history
    if not isinstance(inner, Mapping):
        if inner is None:
            raise ArgumentError(f"{type(recorder).__name__}.history is empty: nothing recorded yet")
        return _found(inner)
    steps = getattr(recorder, "steps", None)
    settings = {
        kind: str(value)
        for kind, attribute in (("sma", "window_size"), ("ema", "decay"))
        if (value := getattr(recorder, attribute, None)) is not None
    }
    if isinstance(steps, Mapping):
        return Found(
            {
                name: Curve(np.asarray(steps[base], np.int64), values)
                for name, column in inner.items()
                if (values := _values(column)) is not None
                for base in [_base(name, inner)]
            },
            settings=settings,
        )
    epochs = getattr(recorder, "epoch", None)
    if not isinstance(epochs, Sequence):
        return _of_mapping(inner)._replace(settings=settings)
    return Found(
        {
            name: Curve(_at_epochs(epochs, values), values)
            for name, column in inner.items()
            if (values := _values(column)) is not None
        },
        "epoch",
        settings,
    )


def _at_epochs(epochs: Sequence[int], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Epochs as the progress bar counts them; validation may come at every n-th only."""
    every, rest = divmod(len(epochs), max(len(values), 1))
    if rest or not every:
        return _counted(values)
    return np.asarray(epochs, np.int64)[every - 1 :: every] + 1


def _of_mapping(history: Mapping[Any, Any], *, blank_nan: bool = False) -> Found:
    """Names and their numbers; one of the columns may count the steps."""
    if history and all(isinstance(curve, Curve) for curve in history.values()):
        return Found({str(name): curve for name, curve in history.items()})
    columns = {}
    for name, given in history.items():
        values = _values(given)
        if values is not None:
            rows = np.flatnonzero(~np.isnan(values)) if blank_nan else np.arange(len(values))
            columns[str(name)] = Column(rows, values[rows])
    columns = {name: column for name, column in columns.items() if len(column.rows)}
    step = table.step_column(columns)
    if step is None:
        return Found({name: Curve(rows + 1, values) for name, (rows, values) in columns.items()})
    curves = table.curves(columns, step)
    return Found({name: curve for name, curve in curves.items() if name != step}, step)


def _values(column: Any) -> NDArray[np.float64] | None:
    """Numbers as float64; None for anything else."""
    try:
        values = np.asarray(column, np.float64)
    except (TypeError, ValueError):
        return None
    return values if values.ndim == 1 else None


def _counted(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.arange(1, len(values) + 1)


def last_finite(values: NDArray[np.float64]) -> float:
    """The last finite number; NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan
