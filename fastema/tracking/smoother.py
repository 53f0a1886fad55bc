"""The curves of a run's metrics: each as it is, and smoothed."""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from fastema.errors import ArgumentError, CheckpointError, NonFiniteError
from fastema.tracking.exponential import ExponentialMovingAverage
from fastema.tracking.lazy_float import LazyFloat, number
from fastema.tracking.scalar import (
    MOST_PENDING,
    MovingAverage,
    OnNonFinite,
    check_settings,
    check_weight,
)
from fastema.tracking.simple import SimpleMovingAverage

__all__ = ["MetricSmoother", "SmoothedMetrics"]

Averages: TypeAlias = dict[str, MovingAverage]


class MetricSmoother:
    """Raw value, simple and exponential moving average of every metric it is given.

    For a metric ``loss`` it gives ``loss_raw``, ``loss_sma`` and ``loss_ema``; metrics are taken up
    as they come.

    Parameters
    ----------
    window_size : int, optional
        Values in the simple moving average, batches or logs with callbacks; None leaves it out.
    decay : float, optional
        Weight of the old exponential moving average, in [0, 1); None leaves it out.
    raw : bool
        Give the values themselves, too.
    debias, on_nonfinite
        See :class:`ExponentialMovingAverage` and :class:`MovingAverage`.
    record : bool
        Keep all curves in :attr:`history`: 8 bytes per number.

    Raises
    ------
    ArgumentError
        If an argument has no valid value, or nothing is asked for.

    Examples
    --------
    >>> smoother = MetricSmoother(window_size=2, decay=0.75)
    >>> smoother.update({"loss": 2.0})
    {'loss_raw': 2.0, 'loss_sma': 2.0, 'loss_ema': 2.0}
    """

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
        SimpleMovingAverage(1, on_nonfinite=on_nonfinite)  # that it is one of those known
        if not (self._new_averages() or raw):
            raise ArgumentError("window_size=None, decay=None, raw=False: nothing is asked for")

    def _new_averages(self) -> Averages:
        """The averages of one metric."""
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
        """Take in a value of each metric given; return ``{"loss_raw": ..., "loss_sma": ...}``.

        Parameters
        ----------
        metrics : mapping of str to number
            What lies on an accelerator is not waited for, but with ``on_nonfinite="raise"``.
        weight : float
            Of these values beside others, such as the size of their batch.
        step : int, optional
            Of the training, for :attr:`steps`.

        Raises
        ------
        ArgumentError, BridgeError, NonFiniteError
            As in :meth:`MovingAverage.update`.
        """
        weight = cast(float, number(weight))
        if not isinstance(weight, LazyFloat) and weight:
            check_weight(weight)
        values = {name: cast(float, number(value)) for name, value in metrics.items()}
        if step is not None:
            step = checked_step(step)
        if self.on_nonfinite == "raise":
            for name, value in values.items():
                if weight and not math.isfinite(value):
                    raise NonFiniteError(f"{name} is {value}: the averages were told to raise")
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
            self._unwritten += found.items()
            if len(self._unwritten) >= MOST_PENDING:
                self._write_down()
        self._latest |= found
        return found

    def _write_down(self) -> None:
        while self._unwritten:
            name, value = self._unwritten[0]
            try:
                found = float(value)
            except Exception:  # raised again by reading the number itself
                found = math.nan
            del self._unwritten[0]
            self._history.setdefault(name, array("d")).append(found)

    @property
    def averages(self) -> dict[str, float]:
        """The latest of all that :meth:`update` gave, as floats.

        What cannot be read from its device raises its error once, and is NaN from then on.
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
        """With ``record=True``: by name, such as ``loss_sma``, one float for each value."""
        self._write_down()
        return self._history

    @property
    def steps(self) -> dict[str, array[int]]:
        """With ``record=True``: by metric, the steps of its values, counted if none were given."""
        return self._steps

    def reset(self) -> None:
        """Forget all metrics and what was recorded."""
        self._metrics: dict[str, Averages] = {}
        self._latest: dict[str, float] = {}
        self._unwritten: list[tuple[str, float]] = []
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
        """All that is needed to continue, fit for JSON, without what was recorded."""
        return {
            **self._settings(),
            "latest": self.averages,
            "metrics": {
                metric: {kind: one.state_dict() for kind, one in averages.items()}
                for metric, averages in self._metrics.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another one of the same settings was. What was recorded here stays.

        Raises
        ------
        CheckpointError
            For any other state, naming what differs. Nothing has changed.
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
    """Mixin of callbacks that smooth metrics: what their smoother knows, up to the latest batch."""

    _smoother: MetricSmoother

    def _process_pending(self) -> None:
        """Give the smoother what waits; nothing does where each batch is given at once."""

    @property
    def averages(self) -> dict[str, float]:
        """The latest values, by the names that are logged."""
        self._process_pending()
        return self._smoother.averages

    @property
    def history(self) -> dict[str, array[float]]:
        """With ``record=True``: by name, one value per batch, for :func:`fastema.tracking.plot`."""
        self._process_pending()
        return self._smoother.history

    @property
    def steps(self) -> dict[str, array[int]]:
        """With ``record=True``: by metric, the numbers of its batches, through all epochs."""
        self._process_pending()
        return self._smoother.steps

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue the averages, fit for JSON, without the history."""
        self._process_pending()
        return self._smoother.state_dict()


def checked_step(step: Any) -> int:
    """A step of the training as a whole number of 64 bits."""
    try:
        found = operator.index(step)
    except TypeError:
        raise ArgumentError(f"step={step!r}: expected a whole number") from None
    if not -(2**63) <= found < 2**63:
        raise ArgumentError(f"step={step!r}: expected a whole number of 64 bits")
    return found
