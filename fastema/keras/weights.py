"""A callback that averages a model's weights."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import keras

from fastema.average import EMA
from fastema.average.checkpoints import Checkpoints, choose_checkpoints
from fastema.average.options import (
    AverageOptions,
    check_ema_options,
    check_which,
    expand_options,
)
from fastema.binding.swap import CallableWay, Swap
from fastema.bridges.registry import leaves_of
from fastema.checkpoint import files, state
from fastema.engine.blocks import BlockSteps, RestoringBlock
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError, CheckpointError, StateError
from fastema.keras.guards import (
    ErrorGuard,
    MethodGuard,
    guard_use,
    guard_writes,
    refuse_writes,
)
from fastema.keras.steps import OptimizerSteps, unwrap_optimizers
from fastema.keras.ways import CopyingSwap, WriteAwareSwap
from fastema.rules import Rule

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EMAWeights"]

Hook: TypeAlias = Literal["test", "predict", "epoch", "end", "block"]
"""Phase in which the average is in the model; "end" lasts until the model is trained again."""

_KERAS_OWN: Final = (keras.callbacks.History, keras.callbacks.ProgbarLogger)
"""Callbacks that Keras adds to every list, and that do not use the weights."""

_WEIGHTS: Final = ".weights.h5"
_BACKUP: Final = ".safetensors"

_fitting_callbacks: weakref.WeakKeyDictionary[Any, weakref.ref[EMAWeights]] = (
    weakref.WeakKeyDictionary()
)
"""Maps a model to the callback whose ``on_train_begin`` was called last."""

_applied_callbacks: weakref.WeakKeyDictionary[Any, weakref.ref[EMAWeights]] = (
    weakref.WeakKeyDictionary()
)
"""Maps a model to the callback whose average it holds."""


def _check_path(value: Any, name: str, suffix: str) -> Path | None:
    if value is None:
        return None
    path = Path(value)
    if not path.name.endswith(suffix):
        raise ArgumentError(f"{name}={os.fspath(value)!r}: the name of the file must end {suffix}")
    return path


def _get_previous_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(_BACKUP) + ".previous" + _BACKUP)


def _keeps_weights(callback: Any) -> bool:
    """Return whether a callback keeps weights that a metric has chosen."""
    return isinstance(callback, keras.callbacks.ModelCheckpoint) or (
        isinstance(callback, keras.callbacks.EarlyStopping) and callback.restore_best_weights
    )


@expand_options
class EMAWeights(keras.callbacks.Callback):  # type: ignore[misc]
    """Averages a model's weights in ``fit``, and uses the average to validate, test and predict.

    After each step of the optimizer, ``avg += (1 - decay) * (x - avg)`` for every weight ``x``. The
    average (:attr:`ema`) is separate from the model, which keeps its own weights for training.

    Parameters
    ----------
    decay : float or rule, or a sequence of them
        Weight of the old average per optimizer step (default 0.999), see :class:`fastema.EMA`.
    checkpoints : {"average", "raw"}, optional
        What callbacks after this one see at the end of an epoch, and what the model holds after
        ``fit``. With ``"average"``, the default, a ``ModelCheckpoint`` saves the weights that
        ``val_loss`` is of, and ``model.evaluate`` and ``model.save`` use the average when ``fit``
        has returned. The training weights come back when the next epoch begins, when the model is
        trained again, and by :meth:`restore`, except those that other callbacks wrote meanwhile.
        This takes the memory of another copy of the weights. With ``"raw"``, only validation,
        ``evaluate`` and ``predict`` with this callback use the average.
    backup : path, optional
        A ``.safetensors`` file to which the state of the average is written at the end of each
        epoch, and from which a new run resumes.
    save_path : path, optional
        A ``.weights.h5`` file to which the average is written at the end of training.
    which : int, optional
        With several decays, the index of the average to evaluate and save.
    zero_debias : bool
        Start from zero and correct the bias, see :class:`fastema.EMA`.
    **options : AverageOptions
        Options that all averages share; see :class:`fastema.average.AverageOptions`.

    Raises
    ------
    ArgumentError
        For paths with another suffix, invalid options of :class:`fastema.EMA`, and several decays
        without ``which``. When training begins, for a model that is not compiled. When the first
        validation of ``fit`` begins, for callbacks that would save the training weights with a
        metric of the average, or back up the average: a ``ModelCheckpoint`` or an
        ``EarlyStopping(restore_best_weights=True)`` before this one, a ``ModelCheckpoint`` that
        saves within epochs, a ``BackupAndRestore`` after this one.
    StateError
        In ``fit``: together with another ``EMAWeights`` or an optimizer with ``use_ema=True``, with
        a model other than the one averaged so far, or while the model holds an average.
    CheckpointError
        In ``fit``, if the state in ``backup`` belongs to another model (the message lists its
        tensors), or to another optimizer step than the model's.

    Warns
    -----
    UserWarning
        When the first validation begins, with ``checkpoints="raw"`` and a ``ModelCheckpoint`` or
        ``EarlyStopping(restore_best_weights=True)``, which keep the training weights.

    Notes
    -----
    The average counts optimizer steps, not batches. The validation in ``fit``,
    ``evaluate(callbacks=[ema])`` and ``predict(callbacks=[ema])`` use the average; for other calls
    use ``with ema.swapped():``. The weights are restored bit for bit, on TensorFlow and PyTorch
    without a copy. See ``docs/keras.md`` for exceptions, other callbacks, batch normalization and
    resuming.

    Examples
    --------
    >>> import keras, numpy as np, fastema.keras
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x = np.random.rand(64, 3)
    >>> ema = fastema.keras.EMAWeights(decay=fastema.rules.warmup(0.999))
    >>> history = model.fit(x, x.sum(1), validation_split=0.25, verbose=0, callbacks=[ema])
    >>> ema.ema.num_updates
    2
    >>> with ema.swapped():
    ...     loss = model.evaluate(x, x.sum(1), verbose=0)

    References
    ----------
    B. Polyak and A. Juditsky, Acceleration of stochastic approximation by averaging, 1992,
    https://doi.org/10.1137/0330046
    """

    def __init__(
        self,
        decay: float | Rule | Sequence[float | Rule] = 0.999,
        *,
        checkpoints: Checkpoints | None = None,
        backup: str | os.PathLike[str] | None = None,
        save_path: str | os.PathLike[str] | None = None,
        which: int | None = None,
        zero_debias: bool = False,
        **options: Unpack[AverageOptions],
    ) -> None:
        super().__init__()
        check_ema_options(decay, zero_debias=zero_debias, **options)
        self._which = check_which(which, decay)
        self._decay = decay
        self._options: dict[str, Any] = {"zero_debias": zero_debias, **options}
        self._checkpoints = choose_checkpoints(checkpoints, True)
        self._has_later_callbacks, self._is_order_checked = True, False
        self._backup = _check_path(backup, "backup", _BACKUP)
        self._save_path = _check_path(save_path, "save_path", _WEIGHTS)
        self._ema: EMA | None = None
        self._deferred_error: StateError | None = None  # raised after the weights are restored
        self._averaged_model: Any = None
        self._pending: Mapping[str, Any] | None = None
        self._steps: OptimizerSteps | None = None
        self._last_step = 0
        self._starts_training = self._in_batch = False
        self._swap: Swap | None = None
        self._hook: Hook | None = None
        self._interrupted: Hook | None = None  # the evaluation whose average a use took out
        self._was_overwritten = False  # by another callback, at the end of this epoch
        self._guards: list[MethodGuard] = []
        self._fit_guard: MethodGuard | None = None

    # -- the average ------------------------------------------------------------------------------

    @property
    def ema(self) -> EMA:
        """The average, with the variables' paths as names; a StateError before training begins."""
        if self._ema is None:
            raise StateError(
                "there is no average yet: it is created when training begins; call "
                "model.fit(callbacks=[...]) with this callback, update(), or load_state_dict()"
            )
        return self._ema

    @property
    def applied(self) -> bool:
        """Whether the model holds the average now."""
        return self._hook is not None

    def _checked_model(self) -> Any:
        model = getattr(self, "_model", None)
        if model is None:
            raise StateError("the callback has no model yet: fit() or set_model() sets it")
        if self._averaged_model is not None and model is not self._averaged_model:
            raise StateError(
                f"this EMAWeights averages another model, {self._averaged_model.name!r}: create "
                "one for each model (and call load_state_dict() to continue with a reloaded model)"
            )
        return model

    def _create_average(self, model: Any) -> bool:
        """Create the average if the model has weights; return whether there is an average."""
        if self._ema is None:
            if not (model.built and model.variables):
                return False
            ema = EMA(model, self._decay, **self._options)
            if self._pending is not None:
                ema.load_state_dict(self._pending)
            self._ema, self._averaged_model, self._pending = ema, model, None
        return True

    def _make_step_counter(self, model: Any) -> OptimizerSteps:
        """Return a counter of the optimizer's steps; raise if the model cannot be averaged."""
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            raise ArgumentError(
                f"the model {model.name!r} has no optimizer, but the average counts its steps: "
                "compile() the model (in your own training loop use fastema.EMA(model))"
            )
        if any(one.use_ema for one in unwrap_optimizers(optimizer)):
            raise StateError(
                "the optimizer has use_ema=True: it would write its own average into the "
                "model, which would be averaged again; leave out use_ema, or EMAWeights"
            )
        return OptimizerSteps(model)

    def update(self) -> None:
        """Update the average if the optimizer has made a step since the last update.

        ``fit`` does this after each batch. In a loop over ``train_on_batch``, call
        ``set_model(model)`` and ``update()`` once before the loop, which creates the average, and
        ``update()`` after each batch.

        Raises
        ------
        StateError
            If there is no model with weights, or the model holds the average.
        """
        self._refuse_applied("update")
        model = self._checked_model()
        if self._steps is None:
            self._steps = self._make_step_counter(model)
            self._last_step = self._steps.count_steps()
        if not self._create_average(model):
            raise StateError(f"the model {model.name!r} has no weights yet: build it first")
        self._update_to(self._steps.count_steps())

    def _update_to(self, done: int) -> None:
        passed, self._last_step = done - self._last_step, done
        if passed == 1:
            self.ema.update()
        elif passed > 1:
            self.ema.update(steps=passed)

    def state_dict(self) -> dict[str, Any]:
        """Return ``ema.state_dict()``, for :meth:`load_state_dict`."""
        return self.ema.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved average, now or as soon as there is a model with weights.

        Parameters
        ----------
        state : mapping
            The result of :meth:`state_dict`, here or of a :class:`fastema.EMA` of the same weights.

        Raises
        ------
        StateError
            While the model holds the average.
        CheckpointError
            If names, shapes, dtypes or the schedule do not match; lists every mismatch, and changes
            nothing.
        """
        self._refuse_applied("load_state_dict")
        if self._ema is not None:
            self._ema.load_state_dict(state)
            return
        self._pending = state
        model = getattr(self, "_model", None)
        if model is not None:
            self._create_average(self._checked_model())

    # -- the average in the model -----------------------------------------------------------------

    def _refuse_applied(self, call: str) -> None:
        if self._hook is not None:
            raise StateError(
                f"{call} while the model holds the average: leave the swapped() block, or call "
                "restore(), first"
            )

    def _apply(self, hook: Hook) -> None:
        """Put the average into the model. Do nothing if it is already there."""
        model = self._checked_model()
        if self._hook is not None:
            return
        if self._ema is None and self._pending is not None:
            self._create_average(model)
        other = _applied_callbacks.get(model, lambda: None)()
        if other is not None and other is not self and other.applied:
            raise StateError(
                "the model holds the average of another EMAWeights: call its restore(), or leave "
                "its swapped() block, first"
            )
        swap = self._swap_for(hook, model)
        self._deferred_error = None
        with defer_signals():
            self._swap, self._hook = swap, hook
            _applied_callbacks[model] = weakref.ref(self)
            try:
                swap.apply()
                self._guards += self._make_guards(model, hook)
            except BaseException:
                self.restore()
                raise

    def _make_guards(self, model: Any, hook: Hook) -> list[MethodGuard]:
        if hook == "block":
            return refuse_writes(model, self._refuse_applied)
        if hook in ("epoch", "end"):
            return guard_writes(model, self.restore, self._restore_before_write)
        return guard_use(model, self._interrupt)

    def _restore_before_write(self) -> None:
        self._was_overwritten = True
        self.restore()

    def _interrupt(self) -> None:
        """Restore the weights for a use within an evaluation, or after one that raised."""
        hook = self._hook
        self.restore()
        self._interrupted = hook

    def _continue(self, hook: Hook) -> None:
        """Put the average back into the model if a use within this evaluation took it out."""
        if self._interrupted == hook:
            self._begin(hook)

    def _swap_for(self, hook: Hook, model: Any) -> Swap:
        ema, which = self.ema, self._which
        is_jax = keras.backend.backend() == "jax"
        until_written = hook in ("epoch", "end")
        if not until_written and not is_jax:
            apply = partial(ema.apply_shadow, which=which)
            return Swap(CallableWay(apply, self._restore_ema))
        if is_jax:
            model.jax_state_sync()
        names = ema.shadows[0].keys()
        leaves = zip(model.weights, leaves_of(model).items, strict=True)
        averaged = [variable for variable, leaf in leaves if leaf.name in names]
        way = WriteAwareSwap if until_written else CopyingSwap
        return Swap(way(model, averaged, partial(ema.copy_to, model, which=which)))

    def _change_hook(self, old: Hook, new: Hook) -> None:
        """Leave the average in the model for another phase, unless it was restored."""
        if self._hook == old:
            with defer_signals():
                self._remove_guards()
                self._hook = new
                self._guards += self._make_guards(self._checked_model(), new)

    def _restore_after(self, *hooks: Hook) -> None:
        if self._hook in hooks:
            self.restore()

    def restore(self) -> None:
        """Restore the model's own weights if it holds the average, however it was applied.

        Raises
        ------
        StateError
            After the weights are restored, if averaged weights were written meanwhile (on PyTorch).
        """
        self._restore_weights()
        self._raise_deferred_error()

    def _restore_weights(self) -> None:
        with defer_signals():
            if self._swap is not None:
                self._swap.restore()
            self._swap = self._hook = None
            self._remove_guards()

    def _remove_guards(self) -> None:
        while self._guards:
            self._guards.pop().remove()

    def _restore_ema(self) -> None:
        """Restore the weights; keep a later error for :meth:`_raise_deferred_error`."""
        try:
            if self.ema.applied:
                self.ema.restore()
        except StateError as error:
            if self.ema.applied:
                raise
            self._deferred_error = error

    def _raise_deferred_error(self) -> None:
        error, self._deferred_error = self._deferred_error, None
        if error is not None:
            raise error

    def swapped(self) -> RestoringBlock[None]:
        """Return a context manager in which the model holds the average.

        The weights are restored on exit, also after an exception. Does nothing within a block or
        call in which the model already holds the average.

        Raises
        ------
        StateError
            If there is no average yet, or the model holds another one.
        """
        return RestoringBlock(self._block_steps)

    def _block_steps(self) -> BlockSteps[None]:
        if self._hook == "end":
            return BlockSteps(
                partial(self._change_hook, "end", "block"),
                partial(self._change_hook, "block", "end"),
            )
        is_outermost = self._hook is None
        if not is_outermost:
            return BlockSteps(partial(self._apply, "block"), lambda: None)
        return BlockSteps(
            partial(self._apply, "block"), self._restore_weights, self._raise_deferred_error
        )

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Write the average to a file in Keras's format for a model's weights.

        ``model.load_weights(path)`` reads it. As with ``model.save_weights``, the file also holds
        the optimizer's state, which belongs to the training weights. The file is replaced
        atomically: there is always the old file or the complete new one.

        Parameters
        ----------
        path : path
            A path that ends in ``.weights.h5``, in an existing folder.

        Raises
        ------
        ArgumentError
            For another suffix.
        StateError
            If there is no average yet.
        """
        final = _check_path(path, "path", _WEIGHTS)
        assert final is not None
        with self.swapped(), files.atomic_write_path(final, _WEIGHTS) as partial:
            model = self._checked_model()
            # Bypass the guards: they would restore the model's weights first.
            type(model).save_weights(model, partial)

    # -- training ---------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Check that the model can be averaged."""
        self._restore_after("test", "predict", "epoch", "end")
        self._refuse_applied("fit")
        model = self._checked_model()
        self._make_step_counter(model)
        self._has_later_callbacks, self._is_order_checked = True, False
        self._was_overwritten = False
        other = _fitting_callbacks.get(model, lambda: None)()
        if other is not None and other is not self:
            # All callbacks of one fit() call have the same dict.
            if other.params is self.params:
                raise StateError(
                    "two EMAWeights in one fit(): each would put its average into the model; for "
                    "several averages give one callback several decays, decay=(0.99, 0.999)"
                )
            other._restore_after("test", "predict", "epoch", "end")
            other._refuse_applied("fit with another EMAWeights")
            other._end_fit()
        _fitting_callbacks[model] = weakref.ref(self)
        for path in (self._backup, self._save_path):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        self._end_fit()
        # fit() validates by self.evaluate: an attribute of the instance shadows the class's method.
        self._fit_guard = ErrorGuard(model, "evaluate", self.restore, self._check_order)
        self._starts_training = True

    def _check_order(self, given: Mapping[str, Any]) -> None:
        """Check the list of all callbacks, which ``fit`` passes only to its validation."""
        listed = given.get("callbacks")
        if not self._is_order_checked and isinstance(listed, keras.callbacks.CallbackList):
            self._is_order_checked = True
            self._check_other_callbacks(listed.callbacks)

    def _check_other_callbacks(self, callbacks: list[Any]) -> None:
        """Raise if callbacks would save other weights than those that the metrics are of."""
        own = next((i for i, one in enumerate(callbacks) if one is self), None)
        if own is None:  # another callback calls this one
            return
        self._has_later_callbacks = any(
            not isinstance(one, _KERAS_OWN) for one in callbacks[own + 1 :]
        )
        keeping = {i: one for i, one in enumerate(callbacks) if _keeps_weights(one)}
        if self._checkpoints == "raw":
            if keeping:
                names = sorted({type(one).__name__ for one in keeping.values()})
                warnings.warn(
                    f"EMAWeights(checkpoints='raw'): {' and '.join(names)} keep the training "
                    "weights, but val_loss and other validation metrics are the average's",
                    stacklevel=2,
                )
            return
        hint = "or pass EMAWeights(checkpoints='raw') to save the training weights"
        for i, one in keeping.items():
            name = type(one).__name__
            if i < own:
                raise ArgumentError(
                    f"{name} comes before EMAWeights in the list of callbacks, so it would keep "
                    "the training weights, but validation metrics are the average's: put "
                    f"EMAWeights before {name}, {hint}"
                )
            if getattr(one, "save_freq", "epoch") != "epoch":
                raise ArgumentError(
                    f"{name}(save_freq={one.save_freq!r}) saves within epochs, when the model "
                    "holds the training weights, but validation metrics are the average's: use "
                    f"save_freq='epoch', {hint}"
                )
        for one in callbacks[own + 1 :]:
            if isinstance(one, keras.callbacks.BackupAndRestore):
                raise ArgumentError(
                    "BackupAndRestore comes after EMAWeights in the list of callbacks, so it would "
                    "resume from the average: put BackupAndRestore before EMAWeights"
                )

    def _end_fit(self) -> None:
        if self._fit_guard is not None:
            self._fit_guard.remove()
            self._fit_guard = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Restore the weights; in the first epoch, create the average or resume from the backup."""
        self._restore_after("epoch")
        self._was_overwritten = False
        self._start_average()

    def _start_average(self) -> None:
        # Not in on_train_begin, where other callbacks load the weights of a resumed run.
        if not self._starts_training:
            return
        self._starts_training = False
        model = self._checked_model()
        self._steps = self._make_step_counter(model)
        done = self._steps.count_steps()
        new = self._ema is None and self._pending is None
        self._create_average(model)
        if self._backup is not None and (new or done != self._last_step):
            self._resume(model, self._backup, done, must_fit=new)
        self._last_step = done

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Record that a batch begins, which may turn out to be missing."""
        self._in_batch = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Update the average if the optimizer has made a step."""
        self._in_batch = False
        if self._steps is None or not self._create_average(self._checked_model()):
            self.update()
        else:
            self._update_to(
                self._last_step + 1 if self._steps.one_per_batch else self._steps.count_steps()
            )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write the backup, and put the average into the model for the callbacks after this."""
        if self._in_batch and self._steps is not None:
            # The data ran out. TensorFlow has still counted a step, for a batch that it did not
            # get: nothing in its graph makes the counter wait for the data.
            self._in_batch, self._last_step = False, self._steps.count_steps()
        if self._backup is not None and self._steps is not None:
            with suppress(FileNotFoundError):
                os.replace(self._backup, _get_previous_path(self._backup))
            with self.ema.lock:
                saved = self.ema.state_dict(copy=False)
                state.write_tensors(self._backup, saved, steps=str(self._steps.count_steps()))
        if self._checkpoints == "average" and self._has_later_callbacks:
            self._apply("epoch")

    def on_train_end(self, logs: Any = None) -> None:
        """Save the average, and leave it in the model or restore the training weights."""
        self._end_fit()
        self._start_average()  # resuming a complete run starts no epoch
        if self._save_path is not None and self._ema is not None:
            self.save_weights(self._save_path)
        if self._checkpoints == "raw" or self._ema is None:
            self._restore_after("epoch")
        elif self._was_overwritten:
            return
        elif self._hook == "epoch":  # keep what other callbacks have written since
            self._change_hook("epoch", "end")
        else:
            self._apply("end")

    def _resume(self, model: Any, backup: Path, done: int, *, must_fit: bool) -> None:
        """Load the backup of the model's step; raise if there is none and ``must_fit`` is true."""
        found = [files.read(path) for path in (backup, _get_previous_path(backup)) if path.exists()]
        if found and self._ema is None:
            raise StateError(
                f"the average in {backup} cannot be loaded: the model has no weights yet; give "
                "it an Input, or build it, before fit()"
            )
        steps = []
        for file in found:
            if "steps" not in file.metadata:
                raise CheckpointError(f"{file.path} is not a backup of EMAWeights")
            steps.append(file.metadata["steps"])
        if str(done) in steps:
            file = found[steps.index(str(done))]
            like = next(iter(self.ema.shadows[0].values()))
            self.ema.load_state_dict(state.read_state(file, like))
        elif found and must_fit:
            held = " and ".join(
                f"{file.path} of step {step}" for file, step in zip(found, steps, strict=True)
            )
            raise CheckpointError(
                f"the model's optimizer is at step {done}, but the backup of the average is {held}:"
                " continue the model from where the average was saved (BackupAndRestore saves it "
                "at the end of the same epochs), or delete the backup to start over"
            )

    # -- evaluation -------------------------------------------------------------------------------

    def _begin(self, hook: Hook) -> None:
        self._interrupted = None
        self._restore_after("test", "predict")
        if self._hook is None:
            self._apply(hook)
        if self._hook in (hook, "end"):
            self._guards.append(ErrorGuard(self._checked_model(), f"{hook}_function", self.restore))

    def _finish(self, hook: Hook) -> None:
        self._interrupted = None
        self._restore_after(hook)
        if self._hook == "end":
            self._guards.pop().remove()

    def on_test_begin(self, logs: Any = None) -> None:
        """Put the average into the model."""
        self._begin("test")

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Put the average back into the model if another callback used its weights."""
        self._continue("test")

    def on_test_end(self, logs: Any = None) -> None:
        """Restore the model's weights."""
        self._finish("test")

    def on_predict_begin(self, logs: Any = None) -> None:
        """Put the average into the model."""
        self._begin("predict")

    def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Put the average back into the model if another callback used its weights."""
        self._continue("predict")

    def on_predict_end(self, logs: Any = None) -> None:
        """Restore the model's weights."""
        self._finish("predict")
