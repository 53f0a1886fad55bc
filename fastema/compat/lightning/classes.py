"""The classes and functions of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import torch

from fastema.compat.averager import ModelAverager
from fastema.compat.swa_utils.classes import AveragedModel, get_ema_multi_avg_fn
from fastema.engine.blocks import BlockSteps, RestoringBlock
from fastema.errors import ArgumentError, StateError
from fastema.lightning.packages import LIGHTNING_MODULES, PACKAGES, replace_method

__all__ = ["EMAWeightAveraging", "WeightAveraging"]


def _peers(name: str) -> tuple[type, ...]:
    """Return Lightning's classes of this name, to inherit from them for ``isinstance`` only."""
    return tuple(getattr(one.callbacks, name, one.Callback) for one in LIGHTNING_MODULES)


def _is_averaging(callback: Any) -> bool:
    """Return whether a callback is an averaging callback, ours or Lightning's."""
    theirs = (
        getattr(one.callbacks, "WeightAveraging", WeightAveraging) for one in LIGHTNING_MODULES
    )
    return isinstance(callback, (WeightAveraging, *theirs))


def _is_sharding(strategy: Any) -> bool:
    """Return whether a strategy shards the weights across processes."""
    names = ("FSDPStrategy", "ModelParallelStrategy")
    theirs = (getattr(one.strategies, name, ()) for one in LIGHTNING_MODULES for name in names)
    return isinstance(strategy, tuple(theirs))


_utilities: Final = LIGHTNING_MODULES[0].utilities

_WeightAveraging: Any = type("WeightAveraging", _peers("WeightAveraging"), {})


class WeightAveraging(_WeightAveraging):  # type: ignore[misc]
    """Callback that averages the weights in training, and uses the average for validation.

    At the end of training the model gets the average. Override :meth:`should_update` to choose the
    steps and epochs after which the average is updated. The first update copies the weights; before
    it, the average is not used. Checkpoints have the layout of Lightning's own (2.6.6): each
    callback resumes the other's. docs/drop-in.md describes their contents and all differences.

    Parameters
    ----------
    device : torch.device, str or int, optional
        Device of the average. Default: the model's. 0 is the first GPU.
    use_buffers : bool
        Average floating-point buffers too (default). If False, copy them at each update.
    **kwargs
        ``avg_fn`` or ``multi_avg_fn`` of :class:`fastema.compat.swa_utils.AveragedModel`. Without
        either, the average is the mean of all weights (SWA).

    Raises
    ------
    LayoutError
        At an update, if the model's tensors have changed since ``fit`` began; names them.
    StateError
        When ``fit`` begins, if the trainer has two averaging callbacks, ours or Lightning's.
    ArgumentError
        When ``fit`` begins, if the strategy shards the weights across processes.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        **kwargs: Any,
    ) -> None:
        # Scripts read these attributes: keep Lightning's names.
        self._device = torch.device(device) if isinstance(device, str) else device
        self._use_buffers = use_buffers
        self._kwargs = kwargs
        self._average_model: AveragedModel | None = None
        self._latest_update_step = 0
        self._latest_update_epoch = -1
        self._averager: ModelAverager | None = None
        self._swap_block: RestoringBlock[None] | None = None
        # "ended": the model holds the average, and checkpoints still save the weights in training.
        self._phase: Literal["outside", "training", "ended", "failed"] = "outside"
        self._unwrap: Callable[[], None] | None = None

    @property
    def _has_updated(self) -> bool:
        """Whether the average has been updated at least once."""
        return self._average_model is not None and bool(self._average_model.n_averaged)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether to update the average now, by default after each step; override it.

        ``step_idx`` is the number of the latest optimizer step, from 0, or None at the end of an
        epoch. ``epoch_idx`` is the number of the epoch that ends, or None after a step.
        """
        return step_idx is not None

    # -- Lightning's hooks -------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Create the average when ``fit`` begins; Lightning loads a checkpoint after this."""
        if stage != "fit":
            if self._phase == "failed":
                self._clean_up()
            return
        self._clean_up()
        if sum(map(_is_averaging, trainer.callbacks)) > 1:
            raise StateError(
                "the trainer has more than one averaging callback, and one would train on the "
                "other's average: keep only one of "
                + ", ".join(type(one).__name__ for one in trainer.callbacks if _is_averaging(one))
            )
        if _is_sharding(trainer.strategy):
            raise ArgumentError(
                f"{type(trainer.strategy).__name__} shards the weights across processes after "
                f"{type(self).__name__} has copied them. With ModelParallelStrategy and "
                "fully_shard, keep fastema.EMA(pl_module) in a callback of your own: create it in "
                "on_fit_start, update it in on_train_batch_end, swap it around validation "
                "(docs/sharded.md)."
            )
        if _overrides_configure_model(pl_module):
            _utilities.rank_zero_warn(
                "WeightAveraging calls configure_model() before the trainer does, to find all "
                "layers: they are not sharded, and may not fit in the memory of one device."
            )
            pl_module.configure_model()
        self._average_model = AveragedModel(
            pl_module,
            device=pl_module.device if self._device is None else self._device,
            use_buffers=self._use_buffers,
            **self._kwargs,
        )
        self._averager = ModelAverager(self._average_model.module)
        self._latest_update_step = trainer.global_step
        self._latest_update_epoch = trainer.current_epoch - 1
        self._phase = "training"
        self._wrap_strategy(trainer.strategy)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if the optimizer made a step and :meth:`should_update` is True."""
        done = trainer.global_step
        # Of several steps, Lightning asks about the last, again after each batch until an update.
        if done > self._latest_update_step and self.should_update(step_idx=done - 1):
            assert self._average_model is not None
            self._average_model.update_parameters(pl_module)
            self._latest_update_step = done

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Update the average if :meth:`should_update` is True for this epoch."""
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            assert self._average_model is not None
            self._average_model.update_parameters(pl_module)
            self._latest_update_epoch = epoch

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Swap the average into the model; after the last checkpoint :meth:`teardown` copies it."""
        self._restore()
        self._phase = "ended"
        self._copy_average_to_current(pl_module)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the average into the model."""
        if self._phase == "training" and self._swap_block is None:
            self._swap_models(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the model's own weights."""
        if self._phase == "training" and self._swap_block is not None:
            self._swap_models(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the model's own weights, wherever the exception came from."""
        self._restore()
        if self._phase != "outside":  # other callbacks save the run after this
            self._phase = "failed"

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the average in the model and release the trainer."""
        if stage != "fit" and self._phase == "training":
            return
        has_average, not_trained = self._swap_block is not None, self._phase == "training"
        self._clean_up()
        if not_trained:  # a finished run was resumed
            self._copy_average_to_current(pl_module)
        elif has_average:
            self._copy_into(pl_module)

    def _clean_up(self) -> None:
        self._restore()
        self._unwrap_strategy()
        self._phase = "outside"

    # -- the average in the model ------------------------------------------------------------------

    # Subclasses override these two methods: call them when, and as often as, Lightning does.

    def _swap_models(self, pl_module: Any) -> None:
        """Swap average and weights, if there is an average; a second call swaps them back."""
        if self._swap_block is None:
            self._apply(pl_module)
        else:
            self._restore()

    def _copy_average_to_current(self, pl_module: Any) -> None:
        """Put the average into the model, by a swap while checkpoints may follow, or by a copy."""
        if self._phase == "ended":
            self._apply(pl_module)
        else:
            self._copy_into(pl_module)

    def _apply(self, pl_module: Any) -> None:
        assert self._averager is not None
        self._swap_block = (
            self._averager.swapped(pl_module) if self._has_updated else RestoringBlock(_no_op)
        )
        try:
            self._swap_block.__enter__()
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        if self._swap_block is not None:
            self._swap_block.close()
            self._swap_block = None

    def _copy_into(self, pl_module: Any) -> None:
        assert self._averager is not None
        if self._has_updated:
            self._averager.write_to(pl_module)

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the step and epoch of the latest update."""
        return {
            "latest_update_step": self._latest_update_step,
            "latest_update_epoch": self._latest_update_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the step and epoch of the latest update; Lightning's own state lacks the epoch."""
        self._latest_update_step = state_dict["latest_update_step"]
        self._latest_update_epoch = state_dict.get("latest_update_epoch", -1)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the average as ``state_dict`` and the weights as ``current_model_state``."""
        if self._phase == "outside" or self._average_model is None:
            _utilities.rank_zero_info(
                "WeightAveraging: there is no average outside of fit: the checkpoint holds only "
                "the model's own weights (after a fit, these are the average)."
            )
            return
        if self._swap_block is not None:
            self._save_in_exchange(trainer, pl_module, checkpoint)
            return
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged}
        if self._has_updated:
            checkpoint["state_dict"] = self._average_model.module.state_dict()

    def _save_in_exchange(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Swap average and weights back, save copies of them, and swap them again."""
        self._restore()
        try:
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
            self.on_save_checkpoint(trainer, pl_module, checkpoint)
            for part in ("state_dict", "current_model_state"):
                checkpoint[part] = {
                    name: value.clone() if isinstance(value, torch.Tensor) else value
                    for name, value in checkpoint[part].items()
                }
        finally:
            self._apply(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Load average and weights from a checkpoint of this callback or of Lightning's."""
        # Outside of fit the model needs only the average, which it has loaded already.
        if self._phase != "training" or self._average_model is None:
            return
        if not {"current_model_state", "averaging_state"} <= checkpoint.keys():
            _utilities.rank_zero_warn(
                "The checkpoint was written without WeightAveraging: the average starts with the "
                "next update."
            )
            if "current_model_state" in checkpoint:  # of fastema.lightning.EMACallback
                pl_module.load_state_dict(checkpoint["current_model_state"], strict=False)
            return
        _utilities.rank_zero_info("WeightAveraging: continues the average of the checkpoint.")
        average = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
        strict = getattr(pl_module, "strict_loading", True)
        self._average_model.load_state_dict(average | checkpoint["averaging_state"], strict=strict)
        # Lightning has loaded "state_dict", the average, into the model.
        pl_module.load_state_dict(checkpoint["current_model_state"], strict=strict)

    def _wrap_strategy(self, strategy: Any) -> None:
        """Wrap ``strategy.save_checkpoint``: Lightning calls no hooks to save weights alone."""
        self._unwrap_strategy()

        def save(
            inner: Callable[..., Any], checkpoint: dict[str, Any], *args: Any, **kw: Any
        ) -> Any:
            return inner(self._insert_average(checkpoint), *args, **kw)

        self._unwrap = replace_method(strategy, "save_checkpoint", save)

    def _unwrap_strategy(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None

    def _insert_average(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return a weights-only checkpoint with the average in it; return others unchanged."""
        if "averaging_state" in checkpoint or self._swap_block is not None or not self._has_updated:
            return checkpoint
        assert self._average_model is not None
        average = self._average_model.module.state_dict()
        current = checkpoint["state_dict"]
        return checkpoint | {
            "state_dict": {name: average.get(name, value) for name, value in current.items()}
        }


def _no_op() -> BlockSteps[None]:
    return BlockSteps(lambda: None, lambda: None)


def _overrides_configure_model(pl_module: Any) -> bool:
    """Return whether the user's module, not Lightning's base class, defines the hook."""
    hook = getattr(type(pl_module), "configure_model", None)
    return hook is not None and not hook.__module__.startswith(PACKAGES)


_EMAWeightAveraging: Any = type(
    "EMAWeightAveraging", (WeightAveraging, *_peers("EMAWeightAveraging")), {}
)


class EMAWeightAveraging(_EMAWeightAveraging):  # type: ignore[misc]
    """Exponential moving average of the weights; see :class:`WeightAveraging`.

    ``avg = decay * avg + (1 - decay) * x`` after every n-th optimizer step; the first update sets
    ``avg = x``.

    Parameters
    ----------
    device, use_buffers, **kwargs
        See :class:`WeightAveraging`.
    decay : float
        Weight of the old average in an update, in [0, 1]. Default 0.999.
    update_every_n_steps : int
        Update after each step whose number, from 0, is a multiple of this; 0 for never. Default 1.
        With n steps between updates the average looks back over n times as many steps;
        :class:`fastema.lightning.EMACallback` keeps that number. Lightning counts the steps of all
        optimizers together, and asks about the last step of a batch.
    update_starting_at_step : int, optional
        Number, from 0, of the first step that may update the average. Default: 0.
    update_starting_at_epoch : int, optional
        Also update at the end of each epoch from this one on. Default: never.

    Raises
    ------
    ArgumentError
        If ``decay`` is outside [0, 1], or an averaging function is given too.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = sorted({"avg_fn", "multi_avg_fn"} & kwargs.keys())
        if given:
            raise ArgumentError(
                f"EMAWeightAveraging({given[0]}=...): it averages with decay={decay!r}; for "
                f"another function use WeightAveraging({given[0]}=...)"
            )
        super().__init__(device, use_buffers, multi_avg_fn=get_ema_multi_avg_fn(decay), **kwargs)
        self.decay = decay
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether the arguments of the constructor ask for an update now."""
        if step_idx is not None:
            first = self.update_starting_at_step
            every = self.update_every_n_steps
            if (first is None or step_idx >= first) and every > 0 and step_idx % every == 0:
                return True
        first = self.update_starting_at_epoch
        return epoch_idx is not None and first is not None and epoch_idx >= first
