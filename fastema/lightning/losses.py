"""Moving averages of the losses of a Lightning run, in its progress bar and its loggers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fastema.errors import ArgumentError, CheckpointError
from fastema.lightning.packages import Callback
from fastema.tracking.scalar import OnNonFinite
from fastema.tracking.smoother import MetricSmoother, SmoothedMetrics

__all__ = ["LossAverages"]


class LossAverages(SmoothedMetrics, Callback):  # type: ignore[misc]
    """Smooths the loss of each training batch, and the metrics that the module logs beside it.

    The defaults log ``train_loss_sma``, the mean over the last 20 batches, ``train_loss_ema``,
    which averages over about ten, and ``train_loss_raw``, the batch's own loss. A metric that
    ``training_step`` logs with ``on_step=True``, say ``train_acc``, gets ``train_acc_sma`` and
    ``train_acc_ema``. All are logged by the module's own ``log``: they reach the progress bar, all
    loggers, and ``trainer.callback_metrics``, for ``ModelCheckpoint`` and ``EarlyStopping``.

    Parameters
    ----------
    window_size, decay, raw, debias, on_nonfinite, record
        Of the averages, see :class:`fastema.tracking.MetricSmoother`. Of what the module logs
        itself no raw values are logged again.
    metrics : sequence of str, optional
        Names of the metrics to smooth, as the module logs them. By default all that it logs with
        ``on_step=True``; ``()`` for the loss alone.
    loss : str or None
        Name of the loss; None leaves it out. A metric that the module logs under this name with
        ``on_step=True`` is smoothed in its place.
    prog_bar : bool
        Show the averages in the progress bar. Losses of single batches are not shown there.
    sync_dist : bool
        In distributed training, smooth the mean loss of all processes, at the cost of a reduction
        per batch, for which they wait for each other. By default each process smooths its own, and
        loggers show that of process zero. The module's metrics are taken as it logs them.
    batch_size : callable, optional
        From a batch to its weight. By default the length of the first tensor found in it, as
        Lightning takes it; a batch without any weighs 1.

    Raises
    ------
    ArgumentError
        If an argument has no valid value.

    Notes
    -----
    **The weight of a batch** is its size: a short last batch counts for what it is.

    **Gradient accumulation.** Lightning divides the loss that callbacks see by
    ``accumulate_grad_batches``. This is undone, and the average moves at every batch.

    **Several optimizers.** With manual optimization the loss is ``"loss"`` in what
    ``training_step`` returns, if there is one.

    **On an accelerator** nothing waits for a loss until it is shown: losses are read, and the
    averages logged, at the batches that the trainer logs (``log_every_n_steps``) and the last one
    of an epoch. For losses on the CPU the averages in the progress bar are those of every batch,
    which takes Lightning about 0.2 ms each; with ``prog_bar=False`` they wait for the logger too.
    Lightning itself reads metrics that the module logs with ``prog_bar=True`` at every batch.

    **Order.** Callbacks that stand before this one in the list see the averages of the batch
    before. Lightning's own progress bar and checkpoints come after all others.

    **Resuming.** The state is in the checkpoint: ``fit(ckpt_path=...)`` continues the curve, to the
    bit. With ``sync_dist=False`` other processes continue from the average of process zero. If the
    window or the decay has changed, a warning says so and the averages begin again. A ``fit`` from
    step 0 always begins again.
    """

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
        if isinstance(metrics, str):
            raise ArgumentError(f"metrics={metrics!r}: expected names, such as ({metrics!r},)")
        if loss is None and metrics is not None and not metrics:
            raise ArgumentError("loss=None, metrics=(): nothing is left to be smoothed")
        self.metrics = None if metrics is None else tuple(metrics)
        self.loss = loss
        self.prog_bar = prog_bar
        self.sync_dist = sync_dist
        self.batch_size = batch_size or _first_length
        self._smoother = MetricSmoother(
            window_size, decay, raw=raw, debias=debias, on_nonfinite=on_nonfinite, record=record
        )
        self._before: dict[str, torch.Tensor] = {}
        self._fresh: dict[str, float] = {}  # averages that are not logged yet
        self._missing = set(self.metrics or ())

    # -- Lightning's hooks -------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Return the key of the state in a checkpoint."""
        return "fastema.lightning.LossAverages"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin again with a new run; a checkpoint is loaded after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._smoother.reset()
            self._fresh = {}
            self._missing = set(self.metrics or ())

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note which metrics are logged already."""
        if self.metrics != ():
            self._before = dict(trainer.callback_metrics)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the batch's loss and metrics, and log the averages."""
        logged = self._logged(trainer)
        values = dict(logged)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self.loss is not None and self.loss not in logged and loss is not None:
            values[self.loss] = self._of_batch(loss, trainer)
        if not values:
            return
        averages = self._smoother.update(
            values, weight=self.batch_size(batch), step=trainer.fit_loop.total_batch_idx
        )
        self._fresh |= {key: value for key, value in averages.items() if key not in _raw(logged)}
        # Lightning's own callbacks ask the same of the trainer, and there is no other way to.
        if trainer._logger_connector.should_update_logs or trainer.is_last_batch:
            self._log(trainer, pl_module, self._fresh)
            self._fresh = {}
        elif self.prog_bar and all(map(_on_host, values.values())):
            raw = _raw(values)
            self._log(trainer, pl_module, {k: v for k, v in averages.items() if k not in raw})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Warn of metrics that were asked for and not logged."""
        if self._missing:
            missing, self._missing = sorted(self._missing), set()
            warnings.warn(
                f"LossAverages(metrics={self.metrics!r}): in a whole epoch no training batch "
                f"logged {', '.join(map(repr, missing))}; it takes "
                "self.log(name, value, on_step=True) in training_step",
                stacklevel=2,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; begin again, with a warning, if its settings differ."""
        try:
            self._smoother.load_state_dict(state_dict)
        except CheckpointError as error:
            warnings.warn(f"LossAverages starts again from nothing: {error}", stacklevel=2)

    # -- their parts -------------------------------------------------------------------------------

    def _logged(self, trainer: Any) -> dict[str, torch.Tensor]:
        """Return the metrics that were logged with ``on_step=True`` since this batch began.

        ``callback_metrics`` keeps all that was ever logged, in other tensor objects of the same
        memory at each batch. A metric logged now has new memory, since the old is still held.
        """
        if self.metrics == ():
            return {}
        before, self._before = self._before, {}
        found = {
            name: value
            for name, value in trainer.callback_metrics.items()
            if name not in before or value.data_ptr() != before[name].data_ptr()
        }
        for name in list(found):  # logged per epoch too, a metric has two names for one value
            if name.removesuffix("_step") != name and name.removesuffix("_step") in found:
                del found[name]
        if self.metrics is not None:
            self._missing -= found.keys()
            found = {n: v for n, v in found.items() if n in self.metrics or n == self.loss}
        return found

    def _of_batch(self, loss: Any, trainer: Any) -> Any:
        """Return the loss as ``training_step`` returned it, or its mean over all processes."""
        parts = trainer.accumulate_grad_batches  # 1 with manual optimization, it must be
        if parts != 1:
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32)) * parts
        if self.sync_dist:
            loss = trainer.strategy.reduce(loss.clone(), reduce_op="mean")  # in place
        return loss

    def _log(self, trainer: Any, pl_module: Any, found: Mapping[str, float]) -> None:
        if trainer.barebones:  # logs nothing, and warns of those who try
            return
        raw = _raw([self.loss])
        for name, value in found.items():
            pl_module.log(
                name,
                # On the CPU and in double precision: a plain number would be copied to the
                # accelerator, wait for it, and be read back from there.
                torch.tensor(float(value), dtype=torch.float64),
                prog_bar=self.prog_bar and name not in raw,
                on_step=True,
                on_epoch=False,
                batch_size=1,
            )


def _raw(names: Iterable[str | None]) -> set[str]:
    return {f"{name}_raw" for name in names}


def _on_host(value: Any) -> bool:
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
