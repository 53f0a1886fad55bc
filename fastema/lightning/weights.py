"""Moving averages of the weights that a Lightning run trains, with all options of fastema.EMA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from fastema.average import EMA
from fastema.average.checkpoints import Checkpoints, choose_checkpoints, training_weights
from fastema.average.options import (
    AverageOptions,
    check_ema_options,
    check_literal,
    check_which,
    expand_options,
)
from fastema.bridges.registry import is_divided, state_of
from fastema.errors import ArgumentError, StateError
from fastema.lightning.packages import LIGHTNING_MODULES, Callback, replace_method
from fastema.rules import Rule

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EMACallback"]

AtEnd = Literal["average", "raw"]

_TRAINING_WEIGHTS: Final = "current_model_state"
"""Entry of a checkpoint with the training weights, named as in those of Lightning's callbacks."""

_warn: Final = LIGHTNING_MODULES[0].utilities.rank_zero_warn


@expand_options
class EMACallback(Callback):  # type: ignore[misc]
    """Exponential moving average of the weights that a ``Trainer`` trains.

    It computes ``avg = x`` when training begins, and ``avg += (1 - decay) * (x - avg)`` after each
    batch in which an optimizer made a step. Validation in ``fit`` uses the average: the average and
    the weights swap, bit for bit, and swap back even if validation fails. A checkpoint's model is
    the average that was validated, and ``fit(ckpt_path=...)`` continues bit for bit.

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
    checkpoints : {"average", "raw"}, optional
        What a checkpoint holds under ``"state_dict"``, and hence what ``test(ckpt_path=...)`` and
        ``load_from_checkpoint`` use. By default the weights that validation uses, which choose the
        best checkpoint: the average, or with ``evaluate_with_average=False`` the training weights.
    which : int, optional
        With several averages, the index of the one to evaluate, to save as the model and to leave
        in the model.
    zero_debias : bool
        Start from zero and correct the bias, see :class:`fastema.EMA`.
    **options : AverageOptions
        Options that all averages share; see :class:`fastema.average.AverageOptions`.

    Raises
    ------
    ArgumentError
        For an invalid argument. When ``fit`` begins, for sharded weights (FSDP, tensor parallel):
        see docs/sharded.md.
    StateError
        If a step is made while the average is in the model.

    Notes
    -----
    **Checkpoints** hold the average under ``"state_dict"``, the training weights that it replaces
    under ``"current_model_state"``, and the state of the average under ``"callbacks"``. A run that
    resumes with this callback continues with the training weights; without it, Lightning warns
    that a callback is missing, and training begins with the average. A checkpoint saved with
    ``save_weights_only=True`` holds the average alone. With ``checkpoints="raw"``, the training
    weights are under ``"state_dict"``, and an evaluation from such a checkpoint warns if the
    average was validated. Checkpoints saved after ``fit`` hold what the model holds.

    A run resumes from the checkpoints of either setting. To use the state of the average elsewhere,
    in full precision::

        ema = fastema.EMA(module)
        ema.load_state_dict(checkpoint["callbacks"]["fastema.lightning.EMACallback"]["ema"])
        ema.copy_to(module)

    DeepSpeed writes the model itself: those checkpoints hold the training weights, with a warning.

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

    def __init__(
        self,
        decay: float | Rule | Sequence[float | Rule] = 0.999,
        *,
        evaluate_with_average: bool = True,
        at_end: AtEnd = "average",
        checkpoints: Checkpoints | None = None,
        which: int | None = None,
        zero_debias: bool = False,
        **options: Unpack[AverageOptions],
    ) -> None:
        super().__init__()
        self.at_end: AtEnd = check_literal(at_end, "at_end", AtEnd)
        self._checkpoints = checkpoints
        self._held_by_checkpoints = choose_checkpoints(checkpoints, evaluate_with_average)
        check_ema_options(decay, zero_debias=zero_debias, **options)
        self._which = check_which(which, decay)
        self.evaluate_with_average = evaluate_with_average
        self._decay = decay
        self._options: dict[str, Any] = {"zero_debias": zero_debias, **options}
        self._ema: EMA | None = None
        # The state of a checkpoint until training begins.
        self._pending_state: dict[str, Any] | None = None
        self._last_step = 0
        self._held_by_model: Checkpoints | None = None  # outside of fit; None if unknown
        self._training_weights: dict[str, Any] | None = None  # of the checkpoint being saved
        self._unwrap: Callable[[], None] | None = None

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
        self._unwrap_strategy()
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
        elif trainer.ckpt_path and trainer.global_step:
            _warn(
                f"{trainer.ckpt_path} has no state of EMACallback: the average begins with the "
                "weights of this checkpoint"
            )
        self._ema, self._pending_state, self._last_step = ema, None, trainer.global_step
        self._held_by_checkpoints = self._choose_checkpoints(trainer.strategy)
        self._unwrap = replace_method(
            trainer.strategy,
            "lightning_module_state_dict",
            partial(self._collect_weights, pl_module),
        )

    def _choose_checkpoints(self, strategy: Any) -> Checkpoints:
        chosen = choose_checkpoints(self._checkpoints, self.evaluate_with_average)
        if chosen == "average" and _writes_the_model_itself(strategy):
            _warn(
                "DeepSpeed writes the model itself, with the training weights, although the "
                "average is validated: EMACallback(checkpoints='average') has no effect, and "
                "test(ckpt_path=...) and load_from_checkpoint use the training weights"
            )
            return "raw"
        return chosen

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
        self._unwrap_strategy()
        self._pending_state = None
        finished = stage == "fit" and trainer.state.status == "running"
        if finished and self._ema is not None and self.at_end == "average":
            # Lightning has moved the module to the host by now.
            pl_module.load_state_dict(self._average_by_key(pl_module), strict=False)
        if stage == "fit":
            self._held_by_model = self.at_end if finished else None

    def _restore(self) -> None:
        if self._ema is not None and self._ema.applied:
            self._ema.restore()

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the average, and what the model is; an empty dict before training."""
        if self._ema is None:
            return {}
        held = self._held_by_model if self._unwrap is None else self._held_by_checkpoints
        return {"ema": self._ema.state_dict()} | ({} if held is None else {"model": held})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state of the average, which is loaded when training begins."""
        self._pending_state = state_dict.get("ema")

    def _average_by_key(self, pl_module: Any) -> dict[str, Any]:
        """Return the average by the keys of the module's state, which name wrappers inside it."""
        average = self.ema.model_state_dict(which=self._which)
        own = state_of(pl_module).items()
        return {key: average[entry.key] for key, entry in own if entry.key in average}

    def _collect_weights(
        self, pl_module: Any, collect: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the model of a checkpoint, whatever the model holds now.

        Replaces a method of the strategy, since Lightning calls no hook to save weights alone.
        """
        ema = self.ema
        applied = ema.applied  # in validation
        self._restore()
        try:
            weights = collect()
            training = training_weights(weights, ema)
            if applied:
                training = {name: one.clone() for name, one in training.items()}
            if self._held_by_checkpoints == "raw":
                weights.update(training)
                return weights
            self._training_weights = training
            average = self._average_by_key(pl_module)
            weights.update({name: average[name] for name in training})
            return weights
        finally:
            if applied:
                ema.apply_shadow(which=self._which)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the training weights beside the average."""
        training, self._training_weights = self._training_weights, None
        if self._unwrap is None or training is None:
            return
        checkpoint[_TRAINING_WEIGHTS] = training
        state = checkpoint["callbacks"][self.state_key]["ema"]
        if not any(key.startswith("residual.") for key in state):
            # torch.save writes a tensor once that occurs twice.
            for name, value in checkpoint["state_dict"].items():
                key = f"shadow.{self._which or 0}.{name}"
                if name in training and key in state and state[key].dtype == value.dtype:
                    state[key] = value

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Load the training weights to continue a run; name what an evaluation uses."""
        training = checkpoint.get(_TRAINING_WEIGHTS)
        held = checkpoint["callbacks"].get(self.state_key, {}).get("model")
        if trainer.state.fn != "fit":
            self._held_by_model = held
            validated = "average" if self.evaluate_with_average else "raw"
            if held not in (None, validated):
                texts = {"average": "the average", "raw": "the training weights"}
                _warn(
                    f"{trainer.state.fn.value} uses {texts[held]}, which the checkpoint holds, but "
                    f"validation in training used {texts[validated]}: see checkpoints={held!r} of "
                    "EMACallback"
                )
        elif training is not None:
            pl_module.load_state_dict(training, strict=False)
        elif held == "average":
            _warn(
                "the checkpoint was saved after fit, when the model held the average: training "
                "continues from the average, not from the training weights"
            )

    def _unwrap_strategy(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None


def _writes_the_model_itself(strategy: Any) -> bool:
    """Return whether a strategy saves the model without asking for its state."""
    theirs = (getattr(one.strategies, "DeepSpeedStrategy", ()) for one in LIGHTNING_MODULES)
    return isinstance(strategy, tuple(one for one in theirs if one))
