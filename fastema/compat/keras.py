"""``keras.callbacks.SwapEMAWeights``: evaluation with the average that an optimizer keeps.

Notes
-----
Where it differs:

- Theirs: on TensorFlow a swap changes the last digit of weights; here: it is exact.
- Theirs: ``predict`` leaves the average in the model; here: restores the weights.
- Theirs: evaluates zeros before the first step; here: evaluates the weights.
- Theirs: an evaluation that raises leaves the average in the model; here: the weights are restored,
  at the latest when the model is used again.
- Theirs: a ``fit`` with ``swap_on_epoch=True`` that stops early loses the average; here: leaves it
  in the model.
- Theirs: on JAX a second ``fit`` with ``use_ema=True`` fails; here: works.
- Theirs: two callbacks undo each other; here: an error.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final, Literal, TypeAlias

import keras

from fastema.binding.swap import CallableWay, Swap, Way
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError, BridgeError, DTypeError, StateError
from fastema.keras.guards import (
    ErrorGuard,
    MethodGuard,
    UseGuard,
    guard_training,
    guard_use,
    guard_writes,
)
from fastema.keras.steps import to_int, unwrap_optimizers
from fastema.keras.ways import CopyingSwap, is_gone
from fastema.plan import Plan

__all__ = ["SwapEMAWeights"]

# The phase of a run that put the average into the model; its end restores the weights.
Hook: TypeAlias = Literal["test", "predict", "epoch"]

_FINALIZE: Final = "finalize_variable_values"

_OWNERS: Final = "_swap_ema_weights"
"""Attribute of a model: the callbacks that guard it or have put the average into it, latest last.

Each call of Keras starts by undoing what these callbacks did, however the earlier call ended.
"""


def _optimizers(model: Any) -> list[Any]:
    """Return the model's optimizers with ``use_ema=True``."""
    optimizer = getattr(model, "optimizer", None)  # a model that was not compiled has none
    found = [] if optimizer is None else unwrap_optimizers(optimizer)
    return [one for one in found if one.use_ema]


def _pair_averages(model: Any) -> list[tuple[Any, Any]]:
    """Return pairs of a weight and its average in the optimizer, as far as averages exist yet."""
    pairs: list[tuple[Any, Any]] = []
    for one in _optimizers(model):
        averages = getattr(one, "_model_variables_moving_average", None)
        # Before the first step the averages are zeros.
        if averages is not None and _read_step(one):
            pairs += zip(one._trainable_variables, averages, strict=True)
    return [(variable, average) for variable, average in pairs if average is not None]


def _unshare_averages(model: Any) -> None:
    """Give averages arrays of their own, since Keras lets them share the model's after a fit.

    On the JAX backend the next fit would otherwise donate the same array twice, and fail.
    """
    if keras.backend.backend() == "jax":
        for variable, average in _pair_averages(model):
            if average.value is variable.value:
                average.assign(keras.ops.copy(average.value))


def _read_step(optimizer: Any) -> int:
    return to_int(next(one for one in optimizer.variables if one.name == "iteration"))


def _one_by_one(pairs: list[tuple[Any, Any]]) -> None:
    for variable, average in pairs:
        value = keras.ops.copy(variable)
        variable.assign(average)
        average.assign(value)


class _ArraySwap(CopyingSwap):
    """A swap for the JAX backend, whose arrays are immutable: variables exchange arrays.

    An evaluation may donate the arrays that it gets, and leaves variables without a value if it
    fails. The model therefore gets copies, and the originals are kept.
    """

    def __init__(self, model: Any, pairs: list[tuple[Any, Any]]) -> None:
        super().__init__(model, [variable for variable, _ in pairs], lambda: None)
        self._pairs = pairs
        self._averages: list[Any] = []

    def _keep_others(self, others: list[Any]) -> list[tuple[Any, Any]]:
        return [(one, keras.ops.copy(one.value)) for one in others]

    def apply(self) -> None:
        """Put the averages into the model, and the weights into the optimizer."""
        super().apply()
        self._averages = [average.value for _, average in self._pairs]
        for variable, average in self._pairs:
            weight = variable.value
            variable.assign(keras.ops.copy(average.value))
            average.assign(weight)

    def restore(self) -> None:
        """Restore weights and averages, even if an evaluation left the model without values."""
        self._sync()
        held = [variable._value for variable, _ in self._pairs]
        super().restore()
        for (_, average), own, now in zip(self._pairs, self._averages, held, strict=True):
            average.assign(own if is_gone(now) else now)


def _choose_way(model: Any, pairs: list[tuple[Any, Any]]) -> Way:
    """Return the way to swap these weights and averages on this backend."""
    if keras.backend.backend() == "jax":
        return _ArraySwap(model, pairs)
    variables, averages = (list(side) for side in zip(*pairs, strict=True))
    try:
        exchange = Plan(variables, averages).swap_
    except (BridgeError, DTypeError):
        # The variables have several replicas or 8 bits, or only the backend reaches their device.
        exchange = partial(_one_by_one, pairs)
    return CallableWay(exchange, exchange)


class SwapEMAWeights(keras.callbacks.Callback):  # type: ignore[misc]
    """Callback that runs validation, test and prediction with the optimizer's average.

    The optimizer needs ``use_ema=True``. Average and weights are swapped before and after an
    evaluation: while the model holds the average, the optimizer's variables hold the weights. At
    the end of ``fit``, Keras leaves the average in the model whenever ``use_ema=True``.

    Parameters
    ----------
    swap_on_epoch : bool
        Also put the average into the model at the end of each epoch, for the callbacks after this
        one in the list: a ``ModelCheckpoint`` there saves the average. The weights are restored
        when the next epoch begins. Default False.

    Raises
    ------
    ArgumentError
        During a run, if no optimizer has ``use_ema=True`` or the model was not compiled.
    StateError
        When a run begins, if its list of callbacks has two ``SwapEMAWeights``.

    Notes
    -----
    The interface is that of ``keras.callbacks.SwapEMAWeights``, Keras 3.15; docs/drop-in.md lists
    the differences. After an evaluation that raises, the weights are restored at once if the model
    raised, or anything in the validation of ``fit``. If the data or another callback raised, they
    are restored when the next ``fit``, ``evaluate``, ``predict``, ``train_on_batch``, ``save`` or
    ``load_weights`` begins, with or without this callback. If ``fit`` ends between epochs with
    ``swap_on_epoch=True``, they are restored when the model is trained, gets other weights, or is
    evaluated with this callback. :meth:`restore` does it by hand.

    Keras defines what ``use_ema`` averages: trained weights, at each batch, even if gradients are
    accumulated over several batches. :class:`fastema.keras.EMAWeights` counts optimizer steps
    instead, and averages with any schedule.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from fastema.compat.keras import SwapEMAWeights
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(use_ema=True, ema_momentum=0.9), "mse")
    >>> x = np.random.rand(64, 3)
    >>> swap = SwapEMAWeights()
    >>> history = model.fit(x, x.sum(1), validation_split=0.25, verbose=0, callbacks=[swap])
    """

    def __init__(self, swap_on_epoch: bool = False) -> None:
        super().__init__()
        self.swap_on_epoch = swap_on_epoch
        self._hook: Hook | None = None
        self._interrupted: Hook | None = None  # the evaluation whose average a use took out
        self._swap: Swap | None = None
        self._guards: list[MethodGuard] = []
        self._fit_guards: list[MethodGuard] = []
        self._model_owned: Any = None
        self._epochs: int | None = None
        self._run: Any = None  # ``params`` of a Keras call, which its callbacks share

    def _register(self) -> None:
        """Register with the model, so that a later callback finds this one."""
        # Bypass setattr, with which Keras would track the list.
        owners = self.model.__dict__.setdefault(_OWNERS, [])
        if self not in owners:
            owners.append(self)
            self._model_owned = self.model

    def _unregister(self) -> None:
        if self._model_owned is None or self._hook is not None or self._fit_guards:
            return
        model, self._model_owned = self._model_owned, None
        owners = vars(model).get(_OWNERS, [])
        if self in owners:
            owners.remove(self)
        if not owners:
            vars(model).pop(_OWNERS, None)

    def _restore_earlier(self) -> None:
        """Undo what callbacks of earlier calls left in the model; refuse two in one call."""
        self._clean_up()
        self._run = self.params
        others = self.model.__dict__.pop(_OWNERS, [])
        is_twice = any(one is not self and one._run is self._run for one in others)
        for one in reversed(others):
            one._clean_up()
        if is_twice:
            raise StateError(
                "two SwapEMAWeights in one list of callbacks would undo each other: leave one of "
                "them out"
            )

    def _apply(self, hook: Hook) -> None:
        """Put the average into the model. Do nothing if it is already there or does not exist."""
        if self._hook is not None:
            return
        model = self.model
        latest = vars(model).get(_OWNERS, [])[-1:]
        if any(one is not self and one._hook is not None for one in latest):
            return  # the enclosing fit put it there at the end of an epoch
        if not _optimizers(model):
            raise ArgumentError(
                f"the model {model.name!r} has no optimizer with use_ema=True, so there is no "
                "average to evaluate: compile it with one, or use fastema.keras.EMAWeights, which "
                "keeps its own average"
            )
        pairs = _pair_averages(model)
        if not pairs:
            return
        swap = Swap(_choose_way(model, pairs))
        with defer_signals():
            swap.apply()
            self._swap, self._hook = swap, hook
            self._register()
            if hook == "epoch":
                self._guards += guard_writes(model, self.restore)
            else:
                self._guards += guard_use(model, self._interrupt)

    def _restore_after(self, *hooks: Hook) -> None:
        if self._hook in hooks:
            self.restore()

    def restore(self) -> None:
        """Restore the model's own weights if it holds the average, whatever put it there."""
        with defer_signals():
            swap, self._swap, self._hook = self._swap, None, None
            if swap is not None:
                swap.restore()
        while self._guards:
            self._guards.pop().remove()
        self._unregister()

    def _interrupt(self) -> None:
        """Restore the weights for a use within an evaluation, or after one that raised."""
        hook = self._hook
        self.restore()
        self._interrupted = hook

    def _end_fit(self) -> None:
        while self._fit_guards:
            self._fit_guards.pop().remove()
        self._unregister()

    def _clean_up(self) -> None:
        """Restore the weights and remove all guards."""
        self.restore()
        self._end_fit()

    def on_train_begin(self, logs: Any = None) -> None:
        """Undo what an earlier call left in the model, and guard the validation."""
        self._restore_earlier()
        _unshare_averages(self.model)
        # fit() calls self.evaluate: an attribute of the instance takes precedence over the method.
        restore = partial(self._restore_after, "test")
        self._fit_guards.append(ErrorGuard(self.model, "evaluate", restore))
        self._fit_guards += guard_training(self.model, self._clean_up)
        self._epochs = (self.params or {}).get("epochs")
        self._register()

    def on_train_end(self, logs: Any = None) -> None:
        """Remove the guards."""
        self._end_fit()
        _unshare_averages(self.model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Restore the model's weights."""
        self._restore_after("epoch")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Put the average into the model if ``swap_on_epoch``; after the last epoch it stays."""
        if not self.swap_on_epoch:
            return
        self._apply("epoch")
        if self._hook != "epoch":
            return
        if epoch + 1 == self._epochs:
            # Keras is about to copy the optimizer's averages, now the weights, into the model.
            for variable, average in _pair_averages(self.model):
                average.assign(keras.ops.copy(variable))
            self._swap = self._hook = None
            self.restore()
        else:
            self._guards.append(UseGuard(self.model.optimizer, _FINALIZE, self.restore))

    def on_test_begin(self, logs: Any = None) -> None:
        """Put the average into the model."""
        self._begin("test")

    def on_test_end(self, logs: Any = None) -> None:
        """Restore the model's weights."""
        self._restore_after("test")

    def on_predict_begin(self, logs: Any = None) -> None:
        """Put the average into the model."""
        self._begin("predict")

    def on_predict_end(self, logs: Any = None) -> None:
        """Restore the model's weights."""
        self._restore_after("predict")

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Put the average back into the model if another callback used its weights."""
        self._continue("test")

    def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Put the average back into the model if another callback used its weights."""
        self._continue("predict")

    def _begin(self, hook: Literal["test", "predict"]) -> None:
        if (
            self.params is not None and self.params is self._run
        ):  # the validation of a fit, which shares its callbacks
            self._restore_after("test", "predict")  # of an evaluation that raised
        else:
            self._restore_earlier()
        self._start(hook)

    def _start(self, hook: Literal["test", "predict"]) -> None:
        self._interrupted = None
        if self._hook is None:
            self._apply(hook)
            if self._hook is not None:
                self._guards.append(ErrorGuard(self.model, f"{hook}_function", self.restore))

    def _continue(self, hook: Literal["test", "predict"]) -> None:
        if self._interrupted == hook:
            self._start(hook)
