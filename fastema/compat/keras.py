"""``keras.callbacks.SwapEMAWeights``: evaluation with the average of an optimizer's ``use_ema``.

Notes
-----
Where it differs:

- Theirs: on TensorFlow a swap changes weights in their last place; here: exact.
- Theirs: ``predict`` leaves the average in the model; here: takes it back.
- Theirs: evaluates zeros before the first step; here: the weights as they are.
- Theirs: an evaluation that raises leaves the average in the model; here: the weights come back, at
  the latest when the model is used again.
- Theirs: a ``fit`` with ``swap_on_epoch=True`` that stops early leaves the average nowhere; here:
  in the model.
- Theirs: on JAX a second ``fit`` with ``use_ema=True`` fails; here: works.
- Theirs: two callbacks undo each other; here: an error.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final, Literal, TypeAlias

import keras

from fastema.binding.swap import Calls, Swap, Way
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError, BridgeError, DTypeError, StateError
from fastema.keras.guards import ErrorGuard, UseGuard, WeightGuard, guard_use, is_running
from fastema.keras.steps import inner, whole_number
from fastema.keras.ways import Aside, is_gone
from fastema.plan import Plan

__all__ = ["SwapEMAWeights"]

# Where in a run the average was put into the model: it is taken back at the end of the same.
Hook: TypeAlias = Literal["test", "predict", "epoch"]

_FINALIZE: Final = "finalize_variable_values"

_OWNERS: Final = "_swap_ema_weights"
"""Attribute of a model's: the callbacks that watch over it, or have put the average there.

The latest is the last. A call takes back what it finds there, however the one before ended.
"""


def _optimizers(model: Any) -> list[Any]:
    """Return the optimizers of the model that average."""
    optimizer = getattr(model, "optimizer", None)  # a model that was not compiled has none
    found = [] if optimizer is None else inner(optimizer)
    return [one for one in found if one.use_ema]


def _averaged(model: Any) -> list[tuple[Any, Any]]:
    """The model's weights with their averages in the optimizer, those that there are by now."""
    pairs: list[tuple[Any, Any]] = []
    for one in _optimizers(model):
        averages = getattr(one, "_model_variables_moving_average", None)
        # Before the first step the averages are zeros.
        if averages is not None and _steps(one):
            pairs += zip(one._trainable_variables, averages, strict=True)
    return [(variable, average) for variable, average in pairs if average is not None]


def _separate(model: Any) -> None:
    """Give averages arrays of their own, which Keras lets share those of the model after a fit.

    On the JAX backend the next fit would donate the same array twice, and fail.
    """
    if keras.backend.backend() == "jax":
        for variable, average in _averaged(model):
            if average.value is variable.value:
                average.assign(keras.ops.copy(average.value))


def _steps(optimizer: Any) -> int:
    return whole_number(next(one for one in optimizer.variables if one.name == "iteration"))


def _one_by_one(pairs: list[tuple[Any, Any]]) -> None:
    for variable, average in pairs:
        value = keras.ops.copy(variable)
        variable.assign(average)
        average.assign(value)


class _Exchanged(Aside):
    """On the JAX backend, whose arrays are never written, variables change arrays.

    What an evaluation is given it may donate, and a failing one leaves nothing behind. The model
    gets copies, therefore, and the arrays themselves are kept.
    """

    def __init__(self, model: Any, pairs: list[tuple[Any, Any]]) -> None:
        super().__init__(model, [variable for variable, _ in pairs], lambda: None)
        self._pairs = pairs
        self._averages: list[Any] = []

    def _kept_beside(self, others: list[Any]) -> list[tuple[Any, Any]]:
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
        """Give both their own, also where an evaluation left the model without any."""
        self._sync()
        held = [variable._value for variable, _ in self._pairs]
        super().restore()
        for (_, average), own, now in zip(self._pairs, self._averages, held, strict=True):
            average.assign(own if is_gone(now) else now)


def _way(model: Any, pairs: list[tuple[Any, Any]]) -> Way:
    """Choose how weights and averages change places."""
    if keras.backend.backend() == "jax":
        return _Exchanged(model, pairs)
    variables, averages = (list(side) for side in zip(*pairs, strict=True))
    try:
        exchange = Plan(variables, averages).swap_
    except (BridgeError, DTypeError):
        # Of several replicas, on a device that only the backend reaches, or of 8 bits.
        exchange = partial(_one_by_one, pairs)
    return Calls(exchange, exchange)


class SwapEMAWeights(keras.callbacks.Callback):  # type: ignore[misc]
    """Validation, test and prediction run with the average that the optimizer keeps.

    For an optimizer with ``use_ema=True``. Average and weights change places before an evaluation
    and after it: while the model holds the average, the optimizer's variables hold the weights. At
    the end of ``fit`` Keras leaves the average in the model whenever ``use_ema=True``.

    Parameters
    ----------
    swap_on_epoch : bool
        Put the average into the model at the end of each epoch too, for the callbacks that come
        after this one in the list: a ``ModelCheckpoint`` there saves the average. The weights come
        back as the next epoch begins.

    Raises
    ------
    ArgumentError
        In a run, if no optimizer has ``use_ema=True``, or the model was not compiled.
    StateError
        As a run begins, if there are two ``SwapEMAWeights`` in its list of callbacks.

    Notes
    -----
    The interface is that of ``keras.callbacks.SwapEMAWeights``, Keras 3.15; docs/drop-in.md says
    what differs. After an evaluation that raises the weights come back at once where the model
    raised, or anything in the validation of ``fit``; where it was the data or another callback, as
    the next ``fit``, ``evaluate``, ``predict``, ``train_on_batch``, ``save`` or ``load_weights``
    begins, with this callback or without. :meth:`restore` does it by hand.

    What ``use_ema`` averages is Keras' own affair: weights that are trained, at each batch, also
    where gradients are accumulated over several. :class:`fastema.keras.EMAWeights` counts steps of
    the optimizer, and averages with any schedule.

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
        self._swap: Swap | None = None
        self._guards: list[WeightGuard] = []
        self._fit_guards: list[WeightGuard] = []
        self._model_owned: Any = None
        self._run: Any = None  # parameters of the call of Keras, one object for all its callbacks

    def _register(self) -> None:
        """Register with the model, so that a later callback finds this one."""
        # Unseen by Keras, which tracks what is set.
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
        """Take back what earlier calls left in the model, whichever callback's they were."""
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
        """Put the average into the model, unless it is there or there is none yet."""
        if self._hook is not None:
            return
        model = self.model
        latest = vars(model).get(_OWNERS, [])[-1:]
        if any(one is not self and one._hook is not None for one in latest):
            return  # it is there, at the end of an epoch of the fit around this
        if not _optimizers(model):
            raise ArgumentError(
                f"the model {model.name!r} has no optimizer with use_ema=True, whose average could "
                "be evaluated: compile it with one, or use fastema.keras.EMAWeights, which "
                "averages itself"
            )
        pairs = _averaged(model)
        if not pairs:
            return
        swap = Swap(_way(model, pairs))
        with defer_signals():
            swap.apply()
            self._swap, self._hook = swap, hook
            self._register()
            self._guards += guard_use(model, self.restore)

    def _restore_after(self, *hooks: Hook) -> None:
        if self._hook in hooks:
            self.restore()

    def restore(self) -> None:
        """Give the model its own weights back, if it holds the average, however it came to it."""
        with defer_signals():
            swap, self._swap, self._hook = self._swap, None, None
            if swap is not None:
                swap.restore()
        while self._guards:
            self._guards.pop().remove()
        self._unregister()

    def _end_fit(self) -> None:
        while self._fit_guards:
            self._fit_guards.pop().remove()
        self._unregister()

    def _clean_up(self) -> None:
        """Leave nothing in the model."""
        self.restore()
        self._end_fit()

    def on_train_begin(self, logs: Any = None) -> None:
        """Give back what an earlier call left, and watch over the validation."""
        self._restore_earlier()
        _separate(self.model)
        # fit() validates by self.evaluate: an attribute of the instance comes before the class's.
        restore = partial(self._restore_after, "test")
        self._fit_guards.append(ErrorGuard(self.model, "evaluate", restore))
        self._fit_guards += guard_use(self.model, self._clean_up)
        self._register()

    def on_train_end(self, logs: Any = None) -> None:
        """Stop watching."""
        self._end_fit()
        _separate(self.model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Give the model its weights back."""
        self._restore_after("epoch")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Put the average into the model where that is wanted; after the last epoch for good."""
        if not self.swap_on_epoch:
            return
        self._apply("epoch")
        if self._hook != "epoch":
            return
        if epoch == (self._run or self.params)["epochs"] - 1:
            # As Keras is about to do, whose last word would give the model its weights otherwise.
            for variable, average in _averaged(self.model):
                average.assign(keras.ops.copy(variable))
            self._swap = self._hook = None
            self.restore()
        else:
            self._guards.append(UseGuard(self.model.optimizer, _FINALIZE, self.restore))

    def on_test_begin(self, logs: Any = None) -> None:
        """Put the average into the model."""
        self._begin("test")

    def on_test_end(self, logs: Any = None) -> None:
        """Give the model its weights back."""
        self._restore_after("test")

    def on_predict_begin(self, logs: Any = None) -> None:
        """Put the average into the model."""
        self._begin("predict")

    def on_predict_end(self, logs: Any = None) -> None:
        """Give the model its weights back."""
        self._restore_after("predict")

    def _begin(self, hook: Literal["test", "predict"]) -> None:
        if is_running(self.model, "fit"):
            self._restore_after("test", "predict")  # of one that was left by an exception
        else:
            self._restore_earlier()
        if self._hook is None:
            self._apply(hook)
            if self._hook is not None:
                self._guards.append(ErrorGuard(self.model, f"{hook}_function", self.restore))
