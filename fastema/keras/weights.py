"""The average of a model's weights as a callback."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import keras

from fastema.binding.swap import Calls, Swap
from fastema.bridges.registry import leaves_of
from fastema.checkpoint import files, state
from fastema.engine.blocks import RestoringBlock, Steps
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError, CheckpointError, StateError
from fastema.keras.guards import ErrorGuard, WeightGuard, guard_use, refuse_writes
from fastema.keras.steps import OptimizerSteps, inner
from fastema.keras.ways import Aside, UnlessWritten
from fastema.rules import Rule
from fastema.shadow import EMA
from fastema.shadow.options import (
    OnNonFinite,
    Policy,
    Rounding,
    WatchMode,
    checked_which,
    options_in,
)

__all__ = ["EMAWeights"]

Hook: TypeAlias = Literal["test", "predict", "epoch", "block"]
"""Phase of a run in which the average was applied: it is restored at the end of the same."""

_WEIGHTS: Final = ".weights.h5"
_BACKUP: Final = ".safetensors"

_in_fit: weakref.WeakKeyDictionary[Any, weakref.ref[EMAWeights]] = weakref.WeakKeyDictionary()
"""Model to the callback that was last told that its training begins."""

_held_by: weakref.WeakKeyDictionary[Any, weakref.ref[EMAWeights]] = weakref.WeakKeyDictionary()
"""Model to the callback whose average it holds."""


def _path(value: Any, name: str, suffix: str) -> Path | None:
    if value is None:
        return None
    path = Path(value)
    if not path.name.endswith(suffix):
        raise ArgumentError(f"{name}={os.fspath(value)!r}: the name of the file must end {suffix}")
    return path


def _previous(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(_BACKUP) + ".previous" + _BACKUP)


class EMAWeights(keras.callbacks.Callback):  # type: ignore[misc]
    """Averages a model's weights in ``fit``; validation, test and prediction run with the average.

    After the n-th step of the optimizer ``avg += (1 - decay) * (x - avg)`` for every weight ``x``.
    The average lies beside the model (:attr:`ema`), which keeps its own weights for training.

    Parameters
    ----------
    decay : float or rule, or a sequence of them
        Weight of the old average, per step of the optimizer, see :class:`fastema.EMA`.
    swap_on_epoch : bool
        Put the average into the model at the end of each epoch, for the callbacks that come after
        this one in the list: a ``ModelCheckpoint`` there saves the average. The weights come back
        as the next epoch begins, and at the end of training, apart from what other callbacks wrote
        meanwhile. Takes the memory of a copy of the weights then.
    backup : path, optional
        A ``.safetensors`` file to which the state of the average is written at the end of each
        epoch, and from which a new run takes it up.
    save_path : path, optional
        A ``.weights.h5`` file for the average at the end of training.
    which : int, optional
        With several decays, the place of the one that is evaluated and saved.
    zero_debias, shadow_dtype, rounding, seed, update_every, start_after
        See :class:`fastema.EMA`.
    frozen, buffers, policy, on_nonfinite, drift, capturable, watch
        See :class:`fastema.EMA`.

    Raises
    ------
    ArgumentError
        For paths with another ending, several decays without ``which``, and, as training begins,
        whatever :class:`fastema.EMA` says of its options, and a model that is not compiled.
    StateError
        In ``fit``: beside another ``EMAWeights`` or an optimizer with ``use_ema=True``, with a
        model that is not the one averaged so far, or while the model holds an average.
    CheckpointError
        In ``fit``, if the state in ``backup`` is of another model, naming its tensors, or of
        another step of the optimizer than the model is at.

    Notes
    -----
    The average follows the optimizer's steps, not batches. The validation in ``fit``,
    ``evaluate(callbacks=[ema])`` and ``predict(callbacks=[ema])`` run with it; for other calls use
    ``with ema.swapped():``. Every bit of the weights comes back, on TensorFlow and PyTorch without
    a copy. Exceptions, other callbacks, batch normalisation, resuming: ``docs/keras.md``.

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
        swap_on_epoch: bool = False,
        backup: str | os.PathLike[str] | None = None,
        save_path: str | os.PathLike[str] | None = None,
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
        options = options_in(locals()) | {"zero_debias": zero_debias}
        super().__init__()
        self._which = checked_which(which, decay)
        self._decay, self._options = decay, options
        self._swap_on_epoch = swap_on_epoch
        self._backup = _path(backup, "backup", _BACKUP)
        self._save_path = _path(save_path, "save_path", _WEIGHTS)
        self._ema: EMA | None = None
        self._written: StateError | None = None  # raised as soon as a swap is undone
        self._averaged: Any = None
        self._pending: Mapping[str, Any] | None = None
        self._steps: OptimizerSteps | None = None
        self._done = 0
        self._opening = self._in_batch = False
        self._swap: Swap | None = None
        self._hook: Hook | None = None
        self._guards: list[WeightGuard] = []
        self._fit_guard: WeightGuard | None = None

    # -- the average ------------------------------------------------------------------------------

    @property
    def ema(self) -> EMA:
        """The average, once training has begun; names are the variables' paths within the model."""
        if self._ema is None:
            raise StateError(
                "there is no average yet: it begins with the weights as training begins; call "
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
            raise StateError("the callback has no model yet: fit() gives it one, or set_model()")
        if self._averaged is not None and model is not self._averaged:
            raise StateError(
                f"this EMAWeights averages another model, {self._averaged.name!r}: make one for "
                "each model (and load_state_dict() to continue in another model that was loaded)"
            )
        return model

    def _begin(self, model: Any) -> bool:
        """Build the average, if the model has weights; return whether there is one."""
        if self._ema is None:
            if not (model.built and model.variables):
                return False
            ema = EMA(model, self._decay, **self._options)
            if self._pending is not None:
                ema.load_state_dict(self._pending)
            self._ema, self._averaged, self._pending = ema, model, None
        return True

    def _counted(self, model: Any) -> OptimizerSteps:
        """The counter of the model's optimizer, and what stands in the way of one."""
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            raise ArgumentError(
                f"the model {model.name!r} has no optimizer, whose steps are what is counted: "
                "compile() it (in a training loop of your own use fastema.EMA(model))"
            )
        if any(one.use_ema for one in inner(optimizer)):
            raise StateError(
                "the optimizer has use_ema=True: it would write an average of its own into the "
                "model, and that would be averaged again; leave out use_ema, or EMAWeights"
            )
        return OptimizerSteps(model)

    def update(self) -> None:
        """Take the current weights into the average, if the optimizer has made a step since.

        In ``fit`` this is done after each batch. In a loop over ``train_on_batch`` call
        ``set_model(model)`` and ``update()`` once before it, with which the average begins, and
        ``update()`` after each batch.

        Raises
        ------
        StateError
            Without a model with weights, or while it holds the average.
        """
        self._refuse_applied("update")
        model = self._checked_model()
        if self._steps is None:
            self._steps = self._counted(model)
            self._done = self._steps.done()
        if not self._begin(model):
            raise StateError(f"the model {model.name!r} has no weights yet: build it first")
        self._update_to(self._steps.done())

    def _update_to(self, done: int) -> None:
        passed, self._done = done - self._done, done
        if passed == 1:
            self.ema.update()
        elif passed > 1:
            self.ema.update(steps=passed)

    def state_dict(self) -> dict[str, Any]:
        """Return ``ema.state_dict()``, for :meth:`load_state_dict`."""
        return self.ema.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved average; before there is a model with weights, as soon as there is one.

        Parameters
        ----------
        state : mapping
            Of :meth:`state_dict`, or of a :class:`fastema.EMA` of the same weights.

        Raises
        ------
        StateError
            While the model holds the average.
        CheckpointError
            Listing every mismatch of names, shapes, dtypes and schedule; nothing was changed.
        """
        self._refuse_applied("load_state_dict")
        if self._ema is not None:
            self._ema.load_state_dict(state)
            return
        self._pending = state
        model = getattr(self, "_model", None)
        if model is not None:
            self._begin(self._checked_model())

    # -- the average in the model -----------------------------------------------------------------

    def _refuse_applied(self, call: str) -> None:
        if self._hook is not None:
            raise StateError(
                f"{call} while the model holds the average: leave the swapped() block, or call "
                "restore(), first"
            )

    def _apply(self, hook: Hook) -> None:
        """Put the average into the model, unless it is there."""
        model = self._checked_model()
        if self._hook is not None:
            return
        if self._ema is None and self._pending is not None:
            self._begin(model)
        other = _held_by.get(model, lambda: None)()
        if other is not None and other is not self and other.applied:
            raise StateError(
                "the model holds the average of another EMAWeights: call its restore(), or leave "
                "its swapped() block, first"
            )
        swap = self._swap_for(hook, model)
        self._written = None
        with defer_signals():
            self._swap, self._hook = swap, hook
            _held_by[model] = weakref.ref(self)
            try:
                swap.apply()
                if hook == "block":
                    self._guards += refuse_writes(model, self._refuse_applied)
                else:
                    self._guards += guard_use(model, self.restore)
            except BaseException:
                self.restore()
                raise

    def _swap_for(self, hook: Hook, model: Any) -> Swap:
        ema, which = self.ema, self._which
        is_jax = keras.backend.backend() == "jax"
        if hook != "epoch" and not is_jax:
            apply = partial(ema.apply_shadow, which=which)
            return Swap(Calls(apply, self._restore_ema))
        if is_jax:
            model.jax_state_sync()
        names = ema.shadows[0].keys()
        leaves = zip(model.weights, leaves_of(model).items, strict=True)
        averaged = [variable for variable, leaf in leaves if leaf.name in names]
        way = UnlessWritten if hook == "epoch" else Aside
        return Swap(way(model, averaged, partial(ema.copy_to, model, which=which)))

    def _restore_after(self, *hooks: Hook) -> None:
        if self._hook in hooks:
            self.restore()

    def restore(self) -> None:
        """Give the model its own weights back, if it holds the average, however it came to it.

        Raises
        ------
        StateError
            Once the weights are back, if averaged weights were written meanwhile (on PyTorch).
        """
        self._put_back()
        self._verify()

    def _put_back(self) -> None:
        with defer_signals():
            if self._swap is not None:
                self._swap.restore()
            self._swap = self._hook = None
            while self._guards:
                self._guards.pop().remove()

    def _restore_ema(self) -> None:
        """Restore, and keep for :meth:`_verify` what an average says once the weights are back."""
        try:
            if self.ema.applied:
                self.ema.restore()
        except StateError as error:
            if self.ema.applied:
                raise
            self._written = error

    def _verify(self) -> None:
        error, self._written = self._written, None
        if error is not None:
            raise error

    def _guard(self, name: str) -> None:
        self._guards.append(ErrorGuard(self._checked_model(), name, self.restore))

    def swapped(self) -> RestoringBlock[None]:
        """A block in which the model holds the average; its weights come back however it ends.

        Within a block, or a call, in which the model holds the average it does nothing.

        Raises
        ------
        StateError
            If there is no average yet, or the model holds another one.
        """
        return RestoringBlock(self._block_steps)

    def _block_steps(self) -> Steps[None]:
        is_outermost = self._hook is None
        if not is_outermost:
            return Steps(partial(self._apply, "block"), lambda: None)
        return Steps(partial(self._apply, "block"), self._put_back, self._verify)

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Write the average to a file as Keras writes a model's weights.

        ``model.load_weights(path)`` reads it. As with ``model.save_weights`` the state of the
        optimizer is in the file too, that of the weights in training. Whatever happens, there is
        the old file or the whole new one.

        Parameters
        ----------
        path : path
            Ends in ``.weights.h5``; its folder must exist.

        Raises
        ------
        ArgumentError
            For another ending.
        StateError
            If there is no average yet.
        """
        final = _path(path, "path", _WEIGHTS)
        assert final is not None
        with self.swapped(), files.moved_into_place(final, _WEIGHTS) as partial:
            model = self._checked_model()
            # Not by way of the guards, which would give the model its weights back before.
            type(model).save_weights(model, partial)

    # -- training ---------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Check that the model can be averaged."""
        self._restore_after("test", "predict", "epoch")
        self._refuse_applied("fit")
        model = self._checked_model()
        self._counted(model)
        other = _in_fit.get(model, lambda: None)()
        if other is not None and other is not self:
            # All callbacks of one call are given the same dict.
            if other.params is self.params:
                raise StateError(
                    "two EMAWeights in one fit(): each would put its average into the model; for "
                    "several averages give one callback several decays, decay=(0.99, 0.999)"
                )
            other._restore_after("test", "predict", "epoch")
            other._refuse_applied("fit with another EMAWeights")
            other._end_fit()
        _in_fit[model] = weakref.ref(self)
        for path in (self._backup, self._save_path):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        self._end_fit()
        # fit() validates by self.evaluate: an attribute of the instance comes before the class's.
        self._fit_guard = ErrorGuard(model, "evaluate", self.restore)
        self._opening = True

    def _end_fit(self) -> None:
        if self._fit_guard is not None:
            self._fit_guard.remove()
            self._fit_guard = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begin the average, or take it up, in the first epoch; the weights come back after it."""
        self._restore_after("epoch")
        self._open()

    def _open(self) -> None:
        # Not in on_train_begin: there other callbacks load what they continue with.
        if not self._opening:
            return
        self._opening = False
        model = self._checked_model()
        self._steps = self._counted(model)
        done = self._steps.done()
        new = self._ema is None and self._pending is None
        self._begin(model)
        if self._backup is not None and (new or done != self._done):
            self._resume(model, self._backup, done, must_fit=new)
        self._done = done

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Expect a batch; there may be none left."""
        self._in_batch = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Take the weights into the average if they are those of another step."""
        self._in_batch = False
        if self._steps is None or not self._begin(self._checked_model()):
            self.update()
        else:
            self._update_to(self._done + 1 if self._steps.one_per_batch else self._steps.done())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write the backup, and put the average into the model where that is wanted."""
        if self._in_batch and self._steps is not None:
            # The data ran out. TensorFlow has counted a step all the same, of a batch that it did
            # not get: nothing in its graph has the counter wait for the data.
            self._in_batch, self._done = False, self._steps.done()
        if self._backup is not None and self._steps is not None:
            with suppress(FileNotFoundError):
                os.replace(self._backup, _previous(self._backup))
            with self.ema.lock:
                saved = self.ema.state_dict(copy=False)
                state.write_state(self._backup, saved, steps=str(self._steps.done()))
        if self._swap_on_epoch:
            self._apply("epoch")

    def on_train_end(self, logs: Any = None) -> None:
        """Give the model its weights back, and save the average."""
        self._restore_after("epoch")
        self._end_fit()
        self._open()  # of a run that had come to its end before
        if self._save_path is not None and self._ema is not None:
            self.save_weights(self._save_path)

    def _resume(self, model: Any, backup: Path, done: int, *, must_fit: bool) -> None:
        """Load the backup that belongs to the model's step."""
        found = [files.read(path) for path in (backup, _previous(backup)) if path.exists()]
        if found and self._ema is None:
            raise StateError(
                f"the average in {backup} cannot be taken up: the model has no weights yet; give "
                "it an Input, or build it, before fit()"
            )
        steps = []
        for file in found:
            if "steps" not in file.metadata:
                raise CheckpointError(f"{file.path} is not a backup of EMAWeights")
            steps.append(file.metadata["steps"])
        if str(done) in steps:
            file = found[steps.index(str(done))]
            like = next(iter(self.ema.state_dict(copy=False)["shadow"][0].values()))
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

    def on_test_begin(self, logs: Any = None) -> None:
        """Put the average into the model."""
        self._restore_after("test", "predict")
        if self._hook is None:
            self._apply("test")
            self._guard("test_function")

    def on_test_end(self, logs: Any = None) -> None:
        """Give the model its weights back."""
        self._restore_after("test")

    def on_predict_begin(self, logs: Any = None) -> None:
        """Put the average into the model."""
        self._restore_after("test", "predict")
        if self._hook is None:
            self._apply("predict")
            self._guard("predict_function")

    def on_predict_end(self, logs: Any = None) -> None:
        """Give the model its weights back."""
        self._restore_after("predict")
