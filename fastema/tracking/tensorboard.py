"""A TensorBoard writer that draws the raw and smoothed values of a metric in one chart.

>>> from fastema.tracking import TensorBoardWriter
>>> with TensorBoardWriter("runs/first") as writer:                # doctest: +SKIP
...     for step, batch in enumerate(batches):
...         writer.add_scalar("loss", train(batch), step)
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from fastema.errors import ArgumentError, CheckpointError, StateError
from fastema.hints import check_options
from fastema.rules.checks import validate_at_least, validate_int
from fastema.tracking.scalar import OnNonFinite
from fastema.tracking.smoother import MetricSmoother, validate_step

__all__ = ["TensorBoardWriter"]


class TensorBoardWriter:
    """Writer of TensorBoard event files with each value and its moving averages.

    TensorBoard draws a tag that occurs in several *runs* as one chart. The writer creates three
    runs, which are subfolders of ``folder``: ``raw`` for the values, ``sma`` for the simple and
    ``ema`` for the exponential moving averages. So the chart of ``loss`` has three lines, which you
    can hide and show by name in the list of runs. Set TensorBoard's own smoothing to 0. To compare
    the averages of several experiments in one folder, filter the runs by ``ema$``.

    Points are buffered with their wall time until a flush; values on an accelerator are not waited
    for before that. A killed process loses at most the points of the last ``flush_secs`` seconds,
    or ``max_queue`` points. Nothing is lost if a ``with`` block, :meth:`close`, the end of the
    program or an exception ends the run.

    Event files store float32; the averages are computed from the original values in double
    precision. Use the writer from one thread of one process, the first if there are several.

    Parameters
    ----------
    folder : path
        Folder of the experiment, created if missing. Existing event files are kept.
    window_size, decay, raw, debias, on_nonfinite
        Settings of the averages, see :class:`fastema.tracking.MetricSmoother`.
    flush_secs : float
        Seconds since the last flush after which the next value triggers a flush, at least 0; 30 by
        default.
    max_queue : int
        Number of buffered points that triggers a flush earlier, at least 1; 1,000 by default.

    Raises
    ------
    ArgumentError
        If an argument is invalid, or the tensorboard package is missing
        (``pip install fastema[tracking]``).
    """

    @check_options
    def __init__(
        self,
        folder: str | os.PathLike[str],
        window_size: int | None = 20,
        decay: float | None = 0.9,
        *,
        raw: bool = True,
        debias: bool = False,
        on_nonfinite: OnNonFinite = "show",
        flush_secs: float = 30.0,
        max_queue: int = 1000,
    ) -> None:
        self.folder = os.fspath(folder)
        self.flush_secs = validate_at_least(flush_secs, "flush_secs", 0.0)
        self.max_queue = validate_int(max_queue, "max_queue", 1)
        self._smoother = MetricSmoother(
            window_size, decay, raw=raw, debias=debias, on_nonfinite=on_nonfinite
        )
        kinds = {"raw": raw, "sma": window_size is not None, "ema": decay is not None}
        self._points = _EventFiles(self.folder, [kind for kind, wanted in kinds.items() if wanted])
        self._counts: dict[str, int] = {}
        self._written_at = time.monotonic()
        # Runs at exit as well, and when the writer is garbage-collected.
        self._finalizer = weakref.finalize(self, self._points.close)

    @property
    def averages(self) -> dict[str, float]:
        """Latest values: ``{"loss_raw": ..., "loss_sma": ..., "loss_ema": ...}``."""
        return self._smoother.averages

    def add_scalar(
        self, tag: str, value: Any, step: int | None = None, *, weight: float = 1.0
    ) -> dict[str, float]:
        """Add one value and return ``{"loss_raw": ..., "loss_sma": ...}``, read on first use.

        Parameters
        ----------
        tag : str
            Name of the chart. TensorBoard groups names with a common prefix before a ``/``.
        value : float, or scalar of NumPy, torch, TensorFlow, JAX, CuPy
            The value. A value on an accelerator is kept without waiting for it.
        step : int, optional
            Position on the horizontal axis; by default the number of earlier values of this tag.
        weight : float
            Weight of this value in the averages, such as the batch size; 1 by default.

        Raises
        ------
        ArgumentError
            If ``tag`` is not a name, ``step`` is not a whole number, or ``weight`` is out of range.
        BridgeError, NonFiniteError
            As in :meth:`MovingAverage.update`.
        StateError
            After :meth:`close`.
        """
        return self.add_scalars({tag: value}, step, weight=weight)

    def add_scalars(
        self, values: Mapping[str, Any], step: int | None = None, *, weight: float = 1.0
    ) -> dict[str, float]:
        """Add one value for each tag in ``values``; see :meth:`add_scalar`."""
        self._points.check_open()
        steps = {tag: self._step(tag, step) for tag in values}
        averages = self._smoother.update(values, weight=weight, step=step)
        now = time.time()
        for name, average in averages.items():
            tag, _, kind = name.rpartition("_")
            self._points.buffer.append((kind, tag, average, steps[tag], now))
        for tag in values:
            self._counts[tag] = self._counts.get(tag, 0) + 1
        overdue = time.monotonic() - self._written_at >= self.flush_secs
        if overdue or len(self._points.buffer) >= self.max_queue:
            self.flush()
        return averages

    def _step(self, tag: str, step: int | None) -> int:
        if not isinstance(tag, str) or not tag:
            raise ArgumentError(f"tag={tag!r}: expected a name")
        return self._counts.get(tag, 0) if step is None else validate_step(step)

    def flush(self) -> None:
        """Write all buffered points to the event files."""
        self._points.check_open()
        self._written_at = time.monotonic()
        self._points.write()

    def close(self) -> None:
        """Write all buffered points and close the files. Do nothing if already closed."""
        self._finalizer()

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the averages and step counts, in types that JSON supports."""
        return {"averages": self._smoother.state_dict(), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a writer with the same settings, to resume a run.

        Raises
        ------
        CheckpointError
            If the state has other settings or entries. Nothing changes.
        """
        try:
            counts = {str(tag): int(count) for tag, count in state["counts"].items()}
            averages = state["averages"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not the state of a TensorBoardWriter: {error!r}") from None
        self._smoother.load_state_dict(averages)
        self._counts = counts


class _EventFiles:
    """Event files and buffered points. They outlive the writer, so that exit can flush them."""

    def __init__(self, folder: str, kinds: list[str]) -> None:
        try:
            new_writer = import_module("tensorboard.summary").Writer
        except ImportError:
            raise ArgumentError(
                "writing event files needs the tensorboard package: pip install fastema[tracking]"
            ) from None
        self.folder = folder
        self._process = os.getpid()
        self.buffer: deque[tuple[str, str, float, int, float]] = deque()
        self._files = {kind: new_writer(os.path.join(folder, kind)) for kind in kinds}

    def check_open(self) -> None:
        if os.getpid() != self._process:
            raise StateError(
                f"the writer of {self.folder} belongs to the process that created it: make another "
                "one after a fork"
            )
        if not self._files:
            raise StateError(f"the writer of {self.folder} is closed: make another one")

    def write(self) -> None:
        """Write all buffered points, then raise the error of the first unreadable value."""
        errors = []
        with np.errstate(over="ignore"):  # numbers beyond float32
            while self.buffer:
                kind, tag, value, step, wall_time = self.buffer.popleft()
                try:
                    number = float(value)
                except Exception as error:
                    errors.append(error)
                    continue
                self._files[kind].add_scalar(tag, number, step, wall_time=wall_time)
        for file in self._files.values():
            file.flush()
        if errors:
            raise errors[0]

    def close(self) -> None:
        if os.getpid() != self._process:
            return  # the writer threads do not exist in a forked process
        files = self._files
        try:
            self.write()
        finally:
            self._files = {}
            for file in files.values():
                file.close()
