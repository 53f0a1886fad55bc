"""A callback for the losses and metrics of single batches, and their moving averages."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from fastema.errors import ArgumentError, FastemaError, StateError
from fastema.hints import check_options
from fastema.keras.sums import BatchSums
from fastema.tracking.scalar import OnNonFinite
from fastema.tracking.smoother import MetricSmoother, SmoothedMetrics, check_metric_names

__all__ = ["LossAverages"]


class LossAverages(SmoothedMetrics, keras.callbacks.Callback):  # type: ignore[misc]
    """Adds the loss of each batch, and its moving averages, to the logs of ``fit``.

    Keras shows as ``loss`` the mean since the epoch began. For the loss and every other metric
    that is a mean, this callback adds to the logs of each batch and each epoch:

    - ``loss_raw``: the value of this batch alone;
    - ``loss_sma``: the mean of the last ``window_size`` batches;
    - ``loss_ema``: ``avg += (1 - decay) * (raw - avg)``, beginning with the first batch.

    The averages continue across epochs; a short last batch counts like any other. The progress bar,
    ``History``, ``CSVLogger``, ``TensorBoard`` (per batch with ``update_freq="batch"``), and
    ``EarlyStopping(monitor="loss_ema", mode="min")`` see them.

    Parameters
    ----------
    window_size, decay, raw, debias, on_nonfinite, record
        Settings of the averages, see :class:`fastema.tracking.MetricSmoother`.
    metrics : sequence of str, optional
        Names in the logs, such as ``("loss",)``; by default all metrics that are means.

    Raises
    ------
    ArgumentError
        For an invalid argument. In ``fit``, before the first batch, for two ``LossAverages``; after
        it, if one of ``metrics`` is not in the logs or is not a mean.
    StateError
        In ``fit``, if the model's train function does not call ``train_step``. In your own loops,
        for a batch that was not announced by ``on_train_batch_begin``.
    NonFiniteError
        In ``fit``, with ``on_nonfinite="raise"``.

    Notes
    -----
    **Place in the list.** Callbacks see what earlier callbacks in the list added to the logs: put
    this one first, since nothing checks the order. A callback before it logs without the averages,
    and one that monitors them warns that there are none. ``History`` and the progress bar, which
    Keras adds itself, come last. Keras does not know our names: pass ``mode="min"`` or ``"max"``.

    **How exact.** A batch's contribution to a metric's sum and count is read within the compiled
    step, before it is rounded into them. ``loss_raw`` is the loss of the batch up to a float32
    rounding of sum and count, after a million batches as after ten, also with class and sample
    weights, a short last batch, several outputs and accumulated gradients. Keras's own values stay
    the same bit for bit. A NaN spoils the value of its batch, but not the rest of the epoch. With
    ``compile(steps_per_execution=n)``, Keras calls callbacks once per n batches: the value is their
    mean, and one step of the averages.

    If a model on JAX overrides ``train_step``, ``compute_metrics`` or ``get_metrics_result``, or a
    metric does not add to its sums by ``assign_add``, values are the differences of the running
    sums. In float32 their error is up to ``6e-8 k |m|`` after k batches with mean m: a thousandth
    of m after 10,000 batches.

    **Metrics that are not means**, such as AUC, precision, IoU or F1, have no batch values from
    which the epoch's value follows: nothing is added for them. For ``RootMeanSquaredError`` the
    value of a batch is the root of the batch's mean. ``val_loss`` and the like are unchanged.

    **Cost.** The step is compiled once more for a model that has been trained before. All values
    reach the host in one small array per step, with the logs that Keras fetches. Keras can call
    this callback asynchronously on JAX with an accelerator.

    **Your own loops.** ``keras.callbacks.CallbackList([...], model=model)`` calls the same hooks
    around ``train_on_batch``.

    Examples
    --------
    >>> losses = fastema.keras.LossAverages(window_size=50, decay=0.95)     # doctest: +SKIP
    >>> board = keras.callbacks.TensorBoard("logs", update_freq="batch")    # doctest: +SKIP
    >>> model.fit(x, y, epochs=5, callbacks=[losses, board])                # doctest: +SKIP
    >>> fastema.tracking.plot(losses)                                       # doctest: +SKIP
    """

    @check_options
    def __init__(
        self,
        window_size: int | None = 20,
        decay: float | None = 0.9,
        raw: bool = True,
        *,
        metrics: Sequence[str] | None = None,
        debias: bool = False,
        on_nonfinite: OnNonFinite = "show",
        record: bool = True,
    ) -> None:
        super().__init__()
        self._metric_names = None if metrics is None else check_metric_names(metrics)
        self._smoother = MetricSmoother(
            window_size, decay, raw=raw, debias=debias, on_nonfinite=on_nonfinite, record=record
        )
        self._sums: BatchSums | None = None
        self._lock = threading.Lock()
        self._thread = 0
        self._batch_averages: dict[int, dict[str, float]] = {}

    @property
    def async_safe(self) -> bool:
        """Whether Keras may call this from other threads, which it asks on JAX and PyTorch.

        With an accelerator, training then need not wait for results; Keras does not report
        PyTorch's devices. On a CPU, other threads cost more than they save.
        """
        return keras.backend.backend() == "jax" and any(
            not name.startswith("cpu") for name in keras.distribution.list_devices()
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the averages without the state of a run, for copies and pickles."""
        self._process_pending()
        return {**vars(self), "_sums": None, "_lock": None, "_batch_averages": {}, "_model": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def window_size(self) -> int | None:
        """Number of batches in the simple moving average."""
        return self._smoother.window_size

    @property
    def decay(self) -> float | None:
        """Weight of the old average in the exponential moving average."""
        return self._smoother.decay

    def reset(self) -> None:
        """Forget all values."""
        self._process_pending()
        self._smoother.reset()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the saved state of another callback.

        Raises a CheckpointError if that callback had other arguments.
        """
        self._process_pending()
        self._smoother.load_state_dict(state)

    # -- training ----------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Replace the model's train function."""
        self._process_pending()
        theirs = getattr(self.model, "train_function", None)
        # All callbacks of one fit() call have the same dict.
        if (
            isinstance(theirs, BatchSums)
            and theirs is not self._sums
            and self.params is not None
            and theirs.run is self.params
        ):
            raise ArgumentError(
                "callbacks: two LossAverages would log the same names: one of them smooths all "
                "metrics"
            )
        if self._sums is None or self._sums.model is not self.model:
            self._sums = BatchSums(self.model)
        self._sums.run = self.params
        self._sums.install()
        self._begin_epoch()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Start recording the batch; batches trained outside of this run are not recorded."""
        sums = self._sums
        assert sums is not None
        if not sums.installed:  # a callback trained the model
            self._process_pending()
            sums.install()
            self._begin_epoch()
        sums.start_recording()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start counting batches; wrap the train function again if Keras has rebuilt it."""
        assert self._sums is not None
        self._process_pending()
        self._sums.install()
        self._begin_epoch()
        self._sums.is_async = self.async_safe
        if self.async_safe:
            self._sums.start_recording()

    def _begin_epoch(self) -> None:
        assert self._sums is not None
        self._sums.begin()
        self._batch_averages.clear()
        self._thread = threading.get_ident()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Add the batch's values and the averages to the logs."""
        # Avoid self.model: on JAX that property fetches the epoch's state, which ends it.
        sums = self._sums
        assert sums is not None
        if not sums.num_executed:
            raise StateError(
                "LossAverages has no record of this batch: call on_train_batch_begin before it "
                "is trained, and train it with fit or train_on_batch"
            )
        last = sums.num_executed - 1
        if threading.get_ident() != self._thread:
            # Each thread has its own batch, and threads arrive in any order: the first one
            # processes what the others need, too.
            last = batch // sums.model.steps_per_execution
        with self._lock:
            self._process_until(last)
            averages = self._batch_averages.pop(last, None)
        if logs is not None and averages is not None:
            logs.update(averages)

    def _process_pending(self) -> None:
        """Add all recorded executions to the averages."""
        if self._sums is not None:
            with self._lock:
                self._process_until(None)

    def _process_until(self, last: int | None) -> None:
        assert self._sums is not None
        try:
            for number, found in self._sums.take(last):
                self._batch_averages[number] = self._smoother.update(self._select_metrics(found))
        except FastemaError:
            self._sums.remove()  # Keras will not call on_train_end
            raise

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Add the latest averages to the logs."""
        assert self._sums is not None
        self._sums.end_recording()
        if logs is not None:
            logs.update(self.averages)

    def on_train_end(self, logs: Any = None) -> None:
        """Restore the model's train function."""
        assert self._sums is not None
        self._process_pending()
        self._sums.remove()

    def _select_metrics(self, values: dict[str, float]) -> dict[str, float]:
        sums = self._sums
        assert sums is not None
        if self._metric_names is None:
            return values
        for name in self._metric_names:
            if name not in sums.means:
                means = ", ".join(map(repr, sums.means)) or "none"
                problem = "the model logs nothing under this name"
                if name in sums.names:
                    problem = "it is not a mean over batches, and has no value for a single batch"
                raise ArgumentError(f"metrics: {name!r}: {problem}; mean metrics: {means}")
        return {name: values[name] for name in self._metric_names if name in values}
