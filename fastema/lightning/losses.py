"""Moving averages of a Lightning run's losses, in its progress bar and loggers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fastema.errors import ArgumentError, CheckpointError
from fastema.hints import check_options
from fastema.lightning.packages import Callback
from fastema.tracking.scalar import OnNonFinite
from fastema.tracking.smoother import MetricSmoother, SmoothedMetrics, check_metric_names

__all__ = ["LossAverages"]


class LossAverages(SmoothedMetrics, Callback):  # type: ignore[misc]
    """Smooths the loss of each training batch, and the metrics that the module logs.

    The defaults log ``train_loss_sma``, the mean over the last 20 batches, ``train_loss_ema``,
    which averages over about ten, and ``train_loss_raw``, the batch's own loss. For a metric that
    ``training_step`` logs with ``on_step=True``, say ``train_acc``, they log ``train_acc_sma`` and
    ``train_acc_ema``. All are logged by the module's own ``log``: they reach the progress bar, all
    loggers, and ``trainer.callback_metrics``, for ``ModelCheckpoint`` and ``EarlyStopping``.

    Parameters
    ----------
    window_size, decay, raw, debias, on_nonfinite, record
        Settings of the averages, see :class:`fastema.tracking.MetricSmoother`. Raw values of
        metrics that the module logs itself are not logged again.
    metrics : sequence of str, optional
        Names of the metrics to smooth, as the module logs them. By default all metrics that it logs
        with ``on_step=True``; ``()`` smooths only the loss.
    loss : str or None
        Name of the loss (default ``"train_loss"``); None leaves the loss out. If the module logs a
        metric under this name with ``on_step=True``, that metric is smoothed instead.
    prog_bar : bool
        Show the averages in the progress bar (default True). Losses of single batches are not shown
        there.
    sync_dist : bool
        In distributed training, smooth the mean loss of all processes. This costs a reduction per
        batch, in which processes wait for each other. By default each process smooths its own loss,
        and loggers show the averages of process zero. Metrics are used as the module logs them.
    batch_size : callable, optional
        Function from a batch to its weight. By default the length of the first tensor in the batch,
        as in Lightning; a batch without tensors has the weight 1.

    Raises
    ------
    ArgumentError
        For an invalid argument.

    Notes
    -----
    **The weight of a batch** is its size, so that a short last batch counts less.

    **Gradient accumulation.** Lightning divides the loss that callbacks see by
    ``accumulate_grad_batches``. This callback undoes the division, and updates the averages at
    every batch.

    **Several optimizers.** With manual optimization, the loss is the entry ``"loss"`` of the value
    that ``training_step`` returns, if there is one.

    **On an accelerator** nothing waits for a loss until it is shown: losses are read, and the
    averages logged, at the batches that the trainer logs (``log_every_n_steps``) and the last one
    of an epoch. For losses on the CPU, the progress bar shows the averages of every batch, which
    takes Lightning about 0.2 ms each; with ``prog_bar=False`` they wait for the logger too.
    Lightning itself reads metrics that the module logs with ``prog_bar=True`` at every batch.

    **Order.** Callbacks that come before this one in the list see the averages of the previous
    batch. Lightning's own progress bar and checkpoints come after all others.

    **Resuming.** The state is in the checkpoint: ``fit(ckpt_path=...)`` continues the curve bit for
    bit. With ``sync_dist=False``, other processes continue from the average of process zero. If the
    window or the decay has changed, the averages start again, with a warning. A ``fit`` from step 0
    always starts again.
    """

    @check_options
    def __init__(
        self,
        window_size: int | None = 20,
        decay: float | None = 0.9,
        raw: bool = True,
        *,
        metrics: Sequence[str] | None = None,
        loss: str | None = "train_loss",
        debias: bool = False,
        on_nonfinite: OnNonFinite = "show",
        record: bool = False,
        prog_bar: bool = True,
        sync_dist: bool = False,
        batch_size: Callable[[Any], float] | None = None,
    ) -> None:
        super().__init__()
        self.metrics = None if metrics is None else check_metric_names(metrics)
        if loss is None and self.metrics == ():
            raise ArgumentError("loss=None, metrics=(): there is nothing to smooth")
        if batch_size is not None and not callable(batch_size):
            raise ArgumentError(
                f"batch_size={batch_size!r}: expected a function from a batch to its weight, such "
                "as len"
            )
        self.loss = loss
        self.prog_bar = prog_bar
        self.sync_dist = sync_dist
        self.batch_size = batch_size or _first_length
        self._smoother = MetricSmoother(
            window_size, decay, raw=raw, debias=debias, on_nonfinite=on_nonfinite, record=record
        )
        self._previous_metrics: dict[str, torch.Tensor] = {}
        self._unlogged: dict[str, float] = {}  # averages that have not been logged
        self._missing = set(self.metrics or ())

    # -- Lightning's hooks -------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint."""
        return "fastema.lightning.LossAverages"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Reset the averages for a new run; Lightning loads a checkpoint after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._smoother.reset()
            self._unlogged = {}
            self._missing = set(self.metrics or ())

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the metrics logged so far, to tell new ones apart."""
        if self.metrics != ():
            self._previous_metrics = dict(trainer.callback_metrics)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's loss and metrics to the averages, and log the averages."""
        logged = self._find_new_metrics(trainer)
        values = dict(logged)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self.loss is not None and self.loss not in logged and loss is not None:
            values[self.loss] = self._get_batch_loss(loss, trainer)
        if not values:
            return
        averages = self._smoother.update(
            values, weight=self.batch_size(batch), step=trainer.fit_loop.total_batch_idx
        )
        self._unlogged |= {
            key: value for key, value in averages.items() if key not in _raw_names(logged)
        }
        # Lightning's own callbacks read this private attribute too: there is no public one.
        if trainer._logger_connector.should_update_logs or trainer.is_last_batch:
            self._log(trainer, pl_module, self._unlogged)
            self._unlogged = {}
        elif self.prog_bar and all(map(_is_on_host, values.values())):
            raw = _raw_names(values)
            self._log(trainer, pl_module, {k: v for k, v in averages.items() if k not in raw})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Warn about requested metrics that no batch has logged."""
        if self._missing:
            missing, self._missing = sorted(self._missing), set()
            warnings.warn(
                f"LossAverages(metrics={self.metrics!r}): in a whole epoch no training batch "
                f"logged {', '.join(map(repr, missing))}; call "
                "self.log(name, value, on_step=True) in training_step",
                stacklevel=2,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state; if its settings differ, warn and start again."""
        try:
            self._smoother.load_state_dict(state_dict)
        except CheckpointError as error:
            warnings.warn(f"LossAverages starts again, without values: {error}", stacklevel=2)

    # -- helpers of the hooks ----------------------------------------------------------------------

    def _find_new_metrics(self, trainer: Any) -> dict[str, torch.Tensor]:
        """Return the metrics that were logged with ``on_step=True`` since this batch began.

        ``callback_metrics`` keeps every metric ever logged, at each batch in new tensor objects
        with the same memory. A metric logged in this batch has new memory, because
        ``self._previous_metrics`` still holds the old one.
        """
        if self.metrics == ():
            return {}
        before, self._previous_metrics = self._previous_metrics, {}
        found = {
            name: value
            for name, value in trainer.callback_metrics.items()
            if name not in before or value.data_ptr() != before[name].data_ptr()
        }
        for name in list(found):  # a metric that is also logged per epoch has two names
            if name.removesuffix("_step") != name and name.removesuffix("_step") in found:
                del found[name]
        if self.metrics is not None:
            self._missing -= found.keys()
            found = {n: v for n, v in found.items() if n in self.metrics or n == self.loss}
        return found

    def _get_batch_loss(self, loss: Any, trainer: Any) -> Any:
        """Return the loss as ``training_step`` returned it, or its mean over all processes."""
        parts = trainer.accumulate_grad_batches  # always 1 with manual optimization
        if parts != 1:
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32)) * parts
        if self.sync_dist:
            loss = trainer.strategy.reduce(loss.clone(), reduce_op="mean")  # in place
        return loss

    def _log(self, trainer: Any, pl_module: Any, found: Mapping[str, float]) -> None:
        if trainer.barebones:  # such a trainer does not log, and warns about attempts
            return
        raw = _raw_names([self.loss])
        for name, value in found.items():
            pl_module.log(
                name,
                # A float64 tensor on the CPU: Lightning would copy a plain number to the
                # accelerator, wait for it, and read it back.
                torch.tensor(float(value), dtype=torch.float64),
                prog_bar=self.prog_bar and name not in raw,
                on_step=True,
                on_epoch=False,
                batch_size=1,
            )


def _raw_names(names: Iterable[str | None]) -> set[str]:
    return {f"{name}_raw" for name in names}


def _is_on_host(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.device.type == "cpu"


def _first_length(batch: Any) -> int:
    """Return the length of the first tensor in nested tuples, lists and mappings; 1 without any."""
    pending = [batch]
    while pending:
        part = pending.pop()
        if isinstance(part, torch.Tensor):
            return len(part) if part.ndim else 1
        if isinstance(part, Mapping):
            part = list(part.values())
        if isinstance(part, (list, tuple)):
            pending += reversed(part)
    return 1
