"""Moving averages of the losses that the Hugging Face ``Trainer`` logs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from fastema.errors import ArgumentError
from fastema.hints import check_options
from fastema.tracking import MetricSmoother
from fastema.tracking.scalar import OnNonFinite
from fastema.tracking.smoother import check_metric_names

__all__ = ["LossAverages"]


class LossAverages(TrainerCallback):  # type: ignore[misc]
    """Adds ``loss_sma`` and ``loss_ema`` to the logs of the ``Trainer``.

    They appear wherever ``loss`` does: in the printed logs, the progress bar and
    ``trainer.state.log_history``. Once :meth:`attach` has put the callback before the loggers of
    ``report_to``, they also appear in TensorBoard, Weights & Biases and the others.

    Parameters
    ----------
    window_size, decay, debias, on_nonfinite
        Settings of the averages, see :class:`fastema.tracking.MetricSmoother`; they count *logs*,
        not steps. The ``Trainer`` itself leaves NaN and infinities out of its losses; with
        ``logging_nan_inf_filter=False`` it logs only NaN from the first one on.
    metrics : sequence of str
        Keys of the logs to smooth (default ``("loss",)``), such as ``("loss", "grad_norm")``.
        ``"eval_loss"`` adds an ``eval_loss_ema``, also for ``metric_for_best_model`` (then set
        ``greater_is_better=False``: the ``Trainer`` maximizes metrics that do not end in ``loss``).

    Raises
    ------
    ArgumentError
        For an invalid argument.

    Notes
    -----
    **Input.** The ``loss`` that the ``Trainer`` logs is the mean over the ``logging_steps`` steps
    (and over all processes) since its last log. This callback smooths these means: with
    ``logging_steps=10`` a window of 20 covers 200 steps. A mean's weight is its number of steps, so
    that a shorter one at the end of an epoch counts less; each log of an evaluation has the weight
    1. For averages per step set ``logging_steps=1``. Each log waits for the accelerator, with or
    without this callback.

    **Order.** The ``Trainer`` calls the loggers of ``report_to`` before ``callbacks=[...]``, and
    the progress bar after them. In ``callbacks=``, this callback works for the progress bar and
    ``log_history``, and warns if loggers are called before it. To put it before all loggers, call
    :meth:`attach`, or list the loggers' callbacks after it:
    ``callbacks=[LossAverages(), TensorBoardCallback()]``.

    **Resuming.** The averages are recomputed from the ``log_history`` in the checkpoint. They
    continue bit for bit if the checkpoint was written at a logged step (the ``Trainer`` forgets the
    loss of steps since the last log). The earlier run need not have had this callback, or the same
    window.
    """

    @check_options
    def __init__(
        self,
        window_size: int | None = 20,
        decay: float | None = 0.9,
        *,
        metrics: Sequence[str] = ("loss",),
        debias: bool = False,
        on_nonfinite: OnNonFinite = "show",
    ) -> None:
        self.metrics = check_metric_names(metrics)
        if not self.metrics:
            raise ArgumentError("metrics=(): expected names, such as ('loss',)")
        # The logs already hold the raw values.
        self._smoother = MetricSmoother(
            window_size, decay, raw=False, debias=debias, on_nonfinite=on_nonfinite
        )
        self._last_step = 0
        self._is_attached = False

    @property
    def averages(self) -> dict[str, float]:
        """The latest averages, by their names in the logs."""
        return self._smoother.averages

    def attach(self, trainer: Any) -> LossAverages:
        """Add this callback to a ``Trainer``, or move it, before all others; return this callback.

        Raises an ArgumentError for any other object.
        """
        handler = getattr(trainer, "callback_handler", None)
        if handler is None:
            raise ArgumentError(
                f"attach({type(trainer).__name__}): expected a transformers.Trainer"
            )
        others = [callback for callback in handler.callbacks if callback is not self]
        handler.callbacks[:] = [self, *others]
        self._is_attached = True
        return self

    # -- the Trainer's events ----------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reset the averages, and recompute them from the logs of a resumed run."""
        self._smoother.reset()
        self._last_step = 0
        for entry in state.log_history:
            self._record(entry, entry.get("step", 0))
        self._last_step = state.global_step
        if args.report_to and not self._is_attached:
            warnings.warn(
                f"the loggers of report_to={list(args.report_to)!r} are called before LossAverages "
                "and will not show its averages: use LossAverages().attach(trainer) instead of "
                "callbacks=[LossAverages()]",
                stacklevel=2,
            )

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the averages to the logs, and to the copy of the logs in the history."""
        logs = {} if logs is None else logs
        averages = self._record(logs, state.global_step)
        copied = state.log_history[-1] if state.log_history else {}
        if averages and all(copied.get(name) is value for name, value in logs.items()):
            copied.update(averages)
        logs.update(averages)

    def _record(self, logs: Mapping[str, Any], step: int) -> dict[str, float]:
        values = {name: logs[name] for name in self.metrics if logs.get(name) is not None}
        if not values:
            return {}
        weight = 1
        if "loss" in logs:  # of training, not of an evaluation
            weight = max(step - self._last_step, 1)
            self._last_step = step
        averages = self._smoother.update(values, weight=weight, step=step)
        return {name: float(average) for name, average in averages.items()}
