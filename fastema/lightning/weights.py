"""Moving averages of the weights that a Lightning run trains, with all options of fastema.EMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from fastema.bridges.registry import is_divided, state_of
from fastema.errors import ArgumentError, StateError
from fastema.hints import check_options
from fastema.lightning.packages import Callback
from fastema.rules import Rule
from fastema.shadow import EMA
from fastema.shadow.options import (
    OnNonFinite,
    Policy,
    Rounding,
    WatchMode,
    check_literal,
    check_which,
    select_shared_options,
)

__all__ = ["EMACallback"]

AtEnd = Literal["average", "raw"]


class EMACallback(Callback):  # type: ignore[misc]
    """Exponential moving average of the weights that a ``Trainer`` trains.

    It computes ``avg = x`` when training begins, and ``avg += (1 - decay) * (x - avg)`` after each
    batch in which an optimizer made a step. Validation in ``fit`` uses the average: the average and
    the weights swap, bit for bit, and swap back even if validation fails. The average is part of
    each checkpoint, and ``fit(ckpt_path=...)`` continues bit for bit.

    Parameters
    ----------
    decay : float or rule, or a sequence of them
        Weight of the old average, in [0, 1) (default 0.999); see :class:`fastema.EMA`. Several
        values give several averages, updated in one pass.
    evaluate_with_average : bool
        Whether validation in ``fit`` uses the average (default True).
    at_end : {"average", "raw"}
        What the model holds when ``fit`` returns, and therefore in ``test`` and ``predict``
        (default "average").
    which : int, optional
        With several averages, the index of the one to evaluate and to leave in the model.
    zero_debias, shadow_dtype, rounding, seed, update_every, start_after
        See :class:`fastema.EMA`.
    frozen, buffers, policy, on_nonfinite, drift, capturable, watch
        See :class:`fastema.EMA`.

    Raises
    ------
    ArgumentError
        For an invalid argument. When ``fit`` begins, for sharded weights (FSDP, tensor parallel):
        see docs/sharded.md.
    StateError
        If a step is made while the average is in the model.

    Notes
    -----
    **Checkpoints** hold the training weights under ``"state_dict"``, and the state of the average
    under ``"callbacks"``. To use the average of a checkpoint elsewhere::

        ema = fastema.EMA(module)
        ema.load_state_dict(checkpoint["callbacks"]["fastema.lightning.EMACallback"]["ema"])
        ema.copy_to(module)

    **Steps.** With several optimizers, or several steps in one batch of manual optimization, the
    average is updated once per batch. With gradient accumulation, batches without a step do not
    count.

    Drop-in classes for Lightning's own callbacks and their checkpoints are in
    :mod:`fastema.compat.lightning`.

    Examples
    --------
    >>> from fastema import rules
    >>> callback = EMACallback(rules.warmup(0.999), shadow_dtype="float32")
    """

    @check_options
    def __init__(
        self,
        decay: float | Rule | Sequence[float | Rule] = 0.999,
        *,
        evaluate_with_average: bool = True,
        at_end: AtEnd = "average",
        which: int | None = None,
        zero_debias: bool = False,
        shadow_dtype: Any = None,
        rounding: Rounding | None = None,
        seed: int = 0,
        update_every: int = 1,
        start_after: int = 0,
        frozen: Policy = "skip",
        buffers: Policy = "copy",
        policy: Mapping[str, Policy] | None = None,
        on_nonfinite: OnNonFinite = "propagate",
        drift: bool = False,
        capturable: bool = False,
        watch: WatchMode = "all",
    ) -> None:
        options = select_shared_options(locals()) | {"zero_debias": zero_debias}
        super().__init__()
        self.at_end: AtEnd = check_literal(at_end, "at_end", AtEnd)
        # Raise errors in options now, not when training begins; capturable needs a GPU to check.
        tried = {**options, "capturable": False}
        EMA([torch.zeros(1)], decay, **tried)
        self._which = check_which(which, decay)
        self.evaluate_with_average = evaluate_with_average
        self._decay, self._options = decay, options
        self._ema: EMA | None = None
        self._pending_state: dict[str, Any] | None = (
            None  # state of a checkpoint until training begins
        )
        self._last_step = 0

    @property
    def ema(self) -> EMA:
        """The average; a StateError before training begins."""
        if self._ema is None:
            raise StateError("there is no average yet: trainer.fit() creates it")
        return self._ema

    # -- Lightning's hooks -------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint."""
        return "fastema.lightning.EMACallback"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Drop the average of an earlier ``fit``; Lightning loads a checkpoint after this."""
        if stage == "fit":
            self._ema = self._pending_state = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Create the average, or continue the average of a checkpoint."""
        if any(map(is_divided, pl_module.parameters())):
            raise ArgumentError(
                "EMACallback saves whole weights, but the weights of this model are sharded (FSDP, "
                "tensor parallel): keep fastema.EMA(pl_module) in a callback of your own "
                "(docs/sharded.md)"
            )
        ema = EMA(pl_module, self._decay, **self._options)
        if self._pending_state is not None:
            ema.load_state_dict(self._pending_state)
        self._ema, self._pending_state, self._last_step = ema, None, trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if an optimizer made a step."""
        if trainer.global_step > self._last_step:
            self.ema.update()
            self._last_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the average into the model."""
        if self._ema is not None and self.evaluate_with_average and trainer.state.fn == "fit":
            self._ema.apply_shadow(which=self._which)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the model's weights."""
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the model's weights, wherever the exception was raised."""
        self._restore()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the average in the model if the run is complete and ``at_end="average"``."""
        self._restore()
        finished = stage == "fit" and trainer.state.status == "running"
        if finished and self._ema is not None and self.at_end == "average":
            # Lightning has moved the module to the host by now.
            averages = self._ema.model_state_dict(which=self._which)
            own = state_of(pl_module)  # its keys have the components of wrappers
            pl_module.load_state_dict(
                {key: averages[one.key] for key, one in own.items() if one.key in averages},
                strict=False,
            )

    def _restore(self) -> None:
        if self._ema is not None and self._ema.applied:
            self._ema.restore()

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the average; an empty dict before training."""
        return {} if self._ema is None else {"ema": self._ema.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state of the average, which is loaded when training begins."""
        self._pending_state = state_dict.get("ema")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the training weights, also during validation, when the model holds the average."""
        if self._ema is None or not self._ema.applied:
            return
        self._ema.restore()
        try:
            weights = trainer.strategy.lightning_module_state_dict()
            checkpoint["state_dict"] = {
                name: one.clone() if isinstance(one, torch.Tensor) else one
                for name, one in weights.items()
            }
        finally:
            self._ema.apply_shadow(which=self._which)
