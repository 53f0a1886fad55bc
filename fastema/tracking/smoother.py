"""Curves of metrics, raw and smoothed."""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Mapping, Sequence, Set
from typing import Any, TypeAlias, cast

from fastema.errors import ArgumentError, CheckpointError, NonFiniteError
from fastema.hints import check_options
from fastema.tracking.exponential import ExponentialMovingAverage
from fastema.tracking.lazy_float import LazyFloat, number
from fastema.tracking.scalar import (
    MAX_PENDING,
    MovingAverage,
    OnNonFinite,
    check_settings,
    check_weight,
)
from fastema.tracking.simple import SimpleMovingAverage

__all__ = ["MetricSmoother", "SmoothedMetrics", "check_metric_names"]

Averages: TypeAlias = dict[str, MovingAverage]


def check_metric_names(metrics: Any) -> tuple[str, ...]:
    """Return the names of metrics as a tuple; raise an ArgumentError for anything else."""
    if isinstance(metrics, str) or not isinstance(metrics, Sequence | Set):
        example = metrics if isinstance(metrics, str) else "loss"
        raise ArgumentError(f"metrics={metrics!r}: expected names, such as ({example!r},)")
    if not all(isinstance(name, str) for name in metrics):
        raise ArgumentError(f"metrics={metrics!r}: expected names, which are strings")
    return tuple(metrics)


class MetricSmoother:
    """Raw values and simple and exponential moving averages of any number of metrics.

    For a metric ``loss`` the smoother returns ``loss_raw``, ``loss_sma`` and ``loss_ema``. A metric
    is added when it first appears.

    Parameters
    ----------
    window_size : int, optional
        Number of values (batches or logs in callbacks) in the simple moving average, 20 by default;
        None to leave out that average.
    decay : float, optional
        Weight of the old exponential moving average, in [0, 1), 0.9 by default; None to leave out
        that average.
    raw : bool
        Also return the raw values; True by default.
    debias, on_nonfinite
        See :class:`ExponentialMovingAverage` and :class:`MovingAverage`.
    record : bool
        Keep all curves in :attr:`history`, at 8 bytes per number; False by default.

    Raises
    ------
    ArgumentError
        If an argument is invalid, or there is nothing to return.

    Examples
    --------
    >>> smoother = MetricSmoother(window_size=2, decay=0.75)
    >>> smoother.update({"loss": 2.0})
    {'loss_raw': 2.0, 'loss_sma': 2.0, 'loss_ema': 2.0}
    """

    @check_options
    def __init__(
        self,
        window_size: int | None = 20,
        decay: float | None = 0.9,
        *,
        raw: bool = True,
        debias: bool = False,
        on_nonfinite: OnNonFinite = "show",
        record: bool = False,
    ) -> None:
        self.window_size, self.decay, self.raw = window_size, decay, raw
        self.debias, self.on_nonfinite, self.record = debias, on_nonfinite, record
        self.reset()
        SimpleMovingAverage(1, on_nonfinite=on_nonfinite)  # validates on_nonfinite
        if not (self._new_averages() or raw):
            raise ArgumentError("window_size=None, decay=None, raw=False: nothing to return")

    def _new_averages(self) -> Averages:
        """Return new averages for one metric."""
        averages: Averages = {}
        if self.window_size is not None:
            averages["sma"] = SimpleMovingAverage(self.window_size, on_nonfinite=self.on_nonfinite)
        if self.decay is not None:
            averages["ema"] = ExponentialMovingAverage(
                self.decay, self.debias, on_nonfinite=self.on_nonfinite
            )
        return averages

    def update(
        self, metrics: Mapping[str, Any], weight: float = 1.0, step: int | None = None
    ) -> dict[str, float]:
        """Add one value per metric and return ``{"loss_raw": ..., "loss_sma": ...}``.

        Parameters
        ----------
        metrics : mapping of str to number
            One value per metric. A value on an accelerator is not waited for, unless
            ``on_nonfinite="raise"``.
        weight : float
            Weight of these values relative to others, such as the batch size; 1 by default.
        step : int, optional
            Training step, recorded in :attr:`steps`; by default one more than the previous step.

        Raises
        ------
        ArgumentError, BridgeError, NonFiniteError
            As in :meth:`MovingAverage.update`.
        """
        if not isinstance(metrics, Mapping):
            raise ArgumentError(
                f"metrics={metrics!r}: expected a mapping of names to numbers, such as "
                "{'loss': loss}"
            )
        weight = cast(float, number(weight))
        if not isinstance(weight, LazyFloat) and weight:
            check_weight(weight)
        values = {name: cast(float, number(value)) for name, value in metrics.items()}
        if step is not None:
            step = validate_step(step)
        if self.on_nonfinite == "raise":
            for name, value in values.items():
                if weight and not math.isfinite(value):
                    raise NonFiniteError(f"{name} is {value}, with on_nonfinite='raise'")
        found: dict[str, float] = {}
        for name, value in values.items():
            if self.raw:
                found[f"{name}_raw"] = value
            if name not in self._metrics:
                self._metrics[name] = self._new_averages()
            for kind, average in self._metrics[name].items():
                found[f"{name}_{kind}"] = average.update(value, weight)
            if self.record:
                steps = self._steps.setdefault(name, array("q"))
                steps.append((steps[-1] if steps else 0) + 1 if step is None else step)
        if self.record:
            self._pending_history += found.items()
            if len(self._pending_history) >= MAX_PENDING:
                self._write_down()
        self._latest |= found
        return found

    def _write_down(self) -> None:
        while self._pending_history:
            name, value = self._pending_history[0]
            try:
                found = float(value)
            except Exception:  # reading the LazyFloat itself raises it again
                found = math.nan
            del self._pending_history[0]
            self._history.setdefault(name, array("d")).append(found)

    @property
    def averages(self) -> dict[str, float]:
        """Latest result of :meth:`update` for each name, as floats.

        A value that cannot be read from its device raises its error once, and is NaN afterwards.
        """
        errors = []
        for name, value in self._latest.items():
            try:
                self._latest[name] = float(value)
            except Exception as error:
                self._latest[name] = math.nan
                errors.append(error)
        if errors:
            raise errors[0]
        return dict(self._latest)

    @property
    def history(self) -> dict[str, array[float]]:
        """With ``record=True``, one float per value under each name, such as ``loss_sma``."""
        self._write_down()
        return self._history

    @property
    def steps(self) -> dict[str, array[int]]:
        """With ``record=True``, the steps of each metric's values, counted if not passed."""
        return self._steps

    def reset(self) -> None:
        """Remove all metrics and recorded curves."""
        self._metrics: dict[str, Averages] = {}
        self._latest: dict[str, float] = {}
        self._pending_history: list[tuple[str, float]] = []
        self._history: dict[str, array[float]] = {}
        self._steps: dict[str, array[int]] = {}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"{type(self).__name__}({settings})"

    def _settings(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in ("window_size", "decay", "debias", "on_nonfinite")
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the averages, in types that JSON supports, without the history."""
        return {
            **self._settings(),
            "latest": self.averages,
            "metrics": {
                metric: {kind: one.state_dict() for kind, one in averages.items()}
                for metric, averages in self._metrics.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a smoother with the same settings, and keep the recorded history.

        Raises
        ------
        CheckpointError
            If the state has other settings or entries; the error names the difference. Nothing
            changes.
        """
        check_settings(self, self._settings(), state)
        metrics: dict[str, Averages] = {}
        try:
            latest = {str(name): float(value) for name, value in state["latest"].items()}
            for metric, states in state["metrics"].items():
                metrics[metric] = self._new_averages()
                for kind, average in metrics[metric].items():
                    average.load_state_dict(states[kind])
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            raise CheckpointError(f"not the state of a MetricSmoother: {error!r}") from None
        self._metrics, self._latest = metrics, latest


class SmoothedMetrics:
    """Mixin for callbacks that smooth metrics: access to the smoother, up to the latest batch."""

    _smoother: MetricSmoother

    def _process_pending(self) -> None:
        """Pass pending batches to the smoother. Do nothing if each batch is passed immediately."""

    @property
    def averages(self) -> dict[str, float]:
        """Latest values by logged name."""
        self._process_pending()
        return self._smoother.averages

    @property
    def history(self) -> dict[str, array[float]]:
        """With ``record=True``, one value per batch for each name, as :func:`plot` draws them."""
        self._process_pending()
        return self._smoother.history

    @property
    def steps(self) -> dict[str, array[int]]:
        """With ``record=True``, the batch numbers of each metric, counted across epochs."""
        self._process_pending()
        return self._smoother.steps

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the averages, in types that JSON supports, without the history."""
        self._process_pending()
        return self._smoother.state_dict()


def validate_step(step: Any) -> int:
    """Return ``step`` as an int; raise an ArgumentError unless it is a signed 64-bit integer."""
    try:
        found = operator.index(step)
    except TypeError:
        raise ArgumentError(f"step={step!r}: expected a whole number") from None
    if not -(2**63) <= found < 2**63:
        raise ArgumentError(f"step={step!r}: expected a whole number of 64 bits")
    return found
