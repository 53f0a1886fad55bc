"""Losses of a training loop of one's own for TensorBoard: as they are, and smoothed, in one chart.

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
from fastema.rules.checks import checked_least, checked_whole
from fastema.tracking.scalar import OnNonFinite
from fastema.tracking.smoother import MetricSmoother, checked_step

__all__ = ["TensorBoardWriter"]


class TensorBoardWriter:
    """Writes each value and its moving averages to event files.

    TensorBoard draws what has one tag in several *runs* into one chart. The values go into the run
    ``raw``, the simple moving averages into ``sma`` and the exponential ones into ``ema``, folders
    of these names below ``folder``: the chart of ``loss`` has three lines, which are hidden and
    shown by their names in the list of runs. Set TensorBoard's own smoothing to 0. Of several
    experiments in one folder the filter ``ema$`` compares the averages.

    Points are kept until they are written out, with the time at which they came, and values on an
    accelerator are not waited for until then. A process that is killed loses what came since: at
    most ``flush_secs`` seconds or ``max_queue`` points. A block ``with``, :meth:`close`, the end of
    the program and an exception that ends it lose nothing.

    Event files hold float32; the averages are worked out in double precision from the values as
    they come. To be used by one thread, in one process: with several, by the first.

    Parameters
    ----------
    folder : path
        Of the experiment; made if it is not there. What it holds already is added to.
    window_size, decay, raw, debias, on_nonfinite
        Of the averages, see :class:`fastema.tracking.MetricSmoother`.
    flush_secs : float
        Seconds after which the next value has everything written out.
    max_queue : int
        Points after which it does so earlier.

    Raises
    ------
    ArgumentError
        If an argument has no valid value, or the tensorboard package is missing
        (``pip install fastema[tracking]``).
    """

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
        self.flush_secs = checked_least(flush_secs, "flush_secs", 0.0)
        self.max_queue = checked_whole(max_queue, "max_queue", 1)
        self._smoother = MetricSmoother(
            window_size, decay, raw=raw, debias=debias, on_nonfinite=on_nonfinite
        )
        kinds = {"raw": raw, "sma": window_size is not None, "ema": decay is not None}
        self._points = _Points(self.folder, [kind for kind, wanted in kinds.items() if wanted])
        self._counts: dict[str, int] = {}
        self._written_at = time.monotonic()
        # Also at exit, and when the writer is no longer referenced.
        self._finalizer = weakref.finalize(self, self._points.close)

    @property
    def averages(self) -> dict[str, float]:
        """The latest of each: ``{"loss_raw": ..., "loss_sma": ..., "loss_ema": ...}``."""
        return self._smoother.averages

    def add_scalar(
        self, tag: str, value: Any, step: int | None = None, *, weight: float = 1.0
    ) -> dict[str, float]:
        """Take in one value; ``{"loss_raw": ..., "loss_sma": ...}``, read when they are used.

        Parameters
        ----------
        tag : str
            Name of the chart. Names with a common part before a ``/`` stand in one section.
        value : float, or scalar of NumPy, torch, TensorFlow, JAX, CuPy
            What lies on an accelerator is kept and not waited for.
        step : int, optional
            Place on the horizontal axis; by default the number of values of this tag before.
        weight : float
            Of this value in the averages, such as the size of its batch.

        Raises
        ------
        ArgumentError
            For a step that is not whole, or a weight that is not a finite number of at least 0.
        BridgeError, NonFiniteError
            As in :meth:`MovingAverage.update`.
        StateError
            After :meth:`close`.
        """
        return self.add_scalars({tag: value}, step, weight=weight)

    def add_scalars(
        self, values: Mapping[str, Any], step: int | None = None, *, weight: float = 1.0
    ) -> dict[str, float]:
        """Take in a value for each of several tags, see :meth:`add_scalar`."""
        self._points.check_open()
        steps = {tag: self._step(tag, step) for tag in values}
        averages = self._smoother.update(values, weight=weight, step=step)
        now = time.time()
        for name, average in averages.items():
            tag, _, kind = name.rpartition("_")
            self._points.waiting.append((kind, tag, average, steps[tag], now))
        for tag in values:
            self._counts[tag] = self._counts.get(tag, 0) + 1
        overdue = time.monotonic() - self._written_at >= self.flush_secs
        if overdue or len(self._points.waiting) >= self.max_queue:
            self.flush()
        return averages

    def _step(self, tag: str, step: int | None) -> int:
        if not isinstance(tag, str) or not tag:
            raise ArgumentError(f"tag={tag!r}: expected a name")
        return self._counts.get(tag, 0) if step is None else checked_step(step)

    def flush(self) -> None:
        """Write out everything that came so far."""
        self._points.check_open()
        self._written_at = time.monotonic()
        self._points.write()

    def close(self) -> None:
        """Write out everything and close the files; a second time does nothing."""
        self._finalizer()

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue the averages, as JSON holds it."""
        return {"averages": self._smoother.state_dict(), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another writer of the same settings was, for a run that was resumed.

        Raises
        ------
        CheckpointError
            For anything else; nothing has changed then.
        """
        try:
            counts = {str(tag): int(count) for tag, count in state["counts"].items()}
            averages = state["averages"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not the state of a TensorBoardWriter: {error!r}") from None
        self._smoother.load_state_dict(averages)
        self._counts = counts


class _Points:
    """The files, and what is to be written to them; outlives the writer, to be closed after it."""

    def __init__(self, folder: str, kinds: list[str]) -> None:
        try:
            new_writer = import_module("tensorboard.summary").Writer
        except ImportError:
            raise ArgumentError(
                "event files are written by the tensorboard package: pip install fastema[tracking]"
            ) from None
        self.folder = folder
        self._process = os.getpid()
        self.waiting: deque[tuple[str, str, float, int, float]] = deque()
        self._files = {kind: new_writer(os.path.join(folder, kind)) for kind in kinds}

    def check_open(self) -> None:
        if os.getpid() != self._process:
            raise StateError(
                f"the writer of {self.folder} belongs to the process that made it: make another "
                "one after a fork"
            )
        if not self._files:
            raise StateError(f"the writer of {self.folder} is closed: make another one")

    def write(self) -> None:
        """Write all that waits; then raise what the first unreadable value raised."""
        errors = []
        with np.errstate(over="ignore"):  # of numbers beyond float32
            while self.waiting:
                kind, tag, value, step, wall_time = self.waiting.popleft()
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
            return  # the threads that write are not in a forked process
        files = self._files
        try:
            self.write()
        finally:
            self._files = {}
            for file in files.values():
                file.close()
