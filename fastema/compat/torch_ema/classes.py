"""The classes and functions of this package."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastema.compat.lists import ListAverage, as_list, clone_list, load_list, move_list, write
from fastema.compat.shares import check_fraction
from fastema.engine.blocks import BlockSteps, RestoringBlock
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError, CheckpointError

__all__ = ["ExponentialMovingAverage"]

_NARROW = torch.float16, torch.bfloat16


class ExponentialMovingAverage(ListAverage):
    """Exponential moving average of parameters, with torch_ema's names and its state.

    It starts as a copy of the parameters. The n-th update computes ``shadow += (1 - d) * (x -
    shadow)`` with ``d = min(decay, (1 + n) / (10 + n))``, or ``d = decay`` without
    ``use_num_updates``, in float32 (float64 if either side is float64).

    Parameters
    ----------
    parameters : iterable of Tensor
        Parameters to average, such as ``model.parameters()``, of any shapes and dtypes, whether
        they require a gradient or not; integers are copied. Only weak references to them are kept.
    decay : float
        Weight of the old average, in [0, 1], otherwise an ArgumentError; may be set between
        updates.
    use_num_updates : bool
        Start with a smaller decay that grows with the number of updates (default).

    Attributes
    ----------
    num_updates : int or None
        Number of updates so far; None without ``use_num_updates``.
    shadow_params, collected_params : list of Tensor
        The averages, and the copies that :meth:`store` keeps, if any.

    Notes
    -----
    Random bits are a function of ``num_updates``, the parameter's place in the list and the
    element's place in the tensor. Differences from torch_ema 0.3 beyond those in
    ``docs/drop-in.md``: tensors of different shapes are an error; stored weights can be copied and
    loaded; without ``use_num_updates`` the state of a 16-bit average holds ``"num_calls"``. The
    average can be pickled. Pickled with its model, it continues with that model's parameters;
    pickled by itself, each call needs the parameters as an argument.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
    >>> ema = ExponentialMovingAverage([weight], decay=0.9, use_num_updates=False)
    >>> with torch.no_grad():
    ...     _ = weight.add_(1.0)
    >>> ema.update()                                # after every optimizer step
    >>> with ema.average_parameters():              # the average in the model
    ...     weight
    Parameter containing:
    tensor([2.1000], requires_grad=True)
    """

    collected_params: list[Tensor] | None
    _stored_as = "collected_params"

    def __init__(
        self, parameters: Iterable[Tensor], decay: float, use_num_updates: bool = True
    ) -> None:
        check_fraction(decay, "decay")
        weights = as_list(parameters, "ExponentialMovingAverage(parameters)")
        super().__init__(weights)
        self.decay = decay
        self.num_updates: int | None = 0 if use_num_updates else None
        self._references = [_WeakReference(one) for one in weights]
        self._num_calls = 0

    def _get_parameters(self, parameters: Iterable[Tensor] | None, call: str) -> list[Tensor]:
        if parameters is not None:
            return self._checked_parameters(parameters, call)
        known = [reference() for reference in self._references]
        alive = [one for one in known if one is not None]
        if len(alive) < len(known):
            raise ArgumentError(
                f"{call}: {len(known) - len(alive)} of the {len(known)} parameters that the "
                "average was built from no longer exist; pass the parameters, or keep their model"
            )
        return alive

    def update(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Update the average from the current parameters; call it after ``optimizer.step()``.

        Parameters
        ----------
        parameters : iterable of Tensor, optional
            Default: the parameters that the average was built from; raise an ArgumentError if some
            no longer exist.

        Raises
        ------
        LayoutError, DTypeError, BridgeError, ArgumentError
            If the number, shapes or kinds of the parameters differ from the average's, or they are
            not tensors. Nothing is changed.
        """
        decay = float(self.decay)
        step = self._num_calls + 1
        if self.num_updates is not None:
            step = self.num_updates + 1
            decay = min(decay, (1 + step) / (10 + step))
        weights = self._get_parameters(parameters, "update")
        with defer_signals():  # an interrupt never separates an update from its count
            self._averager.update(self._shadow, weights, 1.0 - decay, step)
            self._num_calls = step
            if self.num_updates is not None:
                self.num_updates = step

    def copy_to(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Write the average into parameters, rounded to their dtypes; raise as :meth:`update`."""
        super().copy_to(self._get_parameters(parameters, "copy_to"))

    def store(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Keep copies of parameters for :meth:`restore`; raise the errors of :meth:`update`.

        Raise a StateError if stored weights would be lost that :meth:`copy_to` has overwritten.
        """
        super().store(self._get_parameters(parameters, "store"))

    def restore(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Write the stored weights back into parameters, and keep the copies.

        Raise the errors of :meth:`update`, and a StateError without :meth:`store`.
        """
        self._stored.get_weights(self)
        super().restore(self._get_parameters(parameters, "restore"))

    def average_parameters(
        self, parameters: Iterable[Tensor] | None = None
    ) -> RestoringBlock[None]:
        """Return a block in which the parameters hold the average; restore the weights on exit.

        The block keeps a copy of the weights. They are restored bit for bit, also after an
        exception, and also into parameters that were moved, cast or re-pointed inside the block.
        Raise the errors of :meth:`update`.
        """

        def prepare() -> BlockSteps[None]:
            weights = self._get_parameters(parameters, "average_parameters")
            raw = clone_list(weights)
            return BlockSteps(
                lambda: write(self._shadow, weights, "average_parameters"),
                lambda: write(raw, weights, "the raw weights"),
            )

        return RestoringBlock(prepare)

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Move averages and stored weights to a device, and cast floating-point ones to a dtype.

        Averages on another device than the parameters cost a copy of the parameters at each update.
        """
        shadow = move_list(self._shadow, device, dtype)
        if self.collected_params is not None:
            self.collected_params = move_list(self.collected_params, device, dtype)
        self.shadow_params = shadow

    def state_dict(self) -> dict[str, Any]:
        """Return the decay, the number of updates and the tensors themselves, not copies."""
        state = {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "shadow_params": self.shadow_params,
            "collected_params": self.collected_params,
        }
        if self.num_updates is None and any(one.dtype in _NARROW for one in self._shadow):
            state["num_calls"] = self._num_calls
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load copies of a saved average, of this class or of torch_ema's.

        The copies are on the devices of the parameters, or of the current averages if parameters no
        longer exist, and have the wider dtype of the saved and the current average. Raise a
        CheckpointError if an entry is missing or invalid, and a LayoutError that lists tensors that
        differ. Nothing is changed then.
        """
        missing = [k for k in ("decay", "num_updates", "shadow_params") if k not in state_dict]
        if missing:
            raise CheckpointError(f"the state has no {', '.join(map(repr, missing))}")
        decay, num_updates = state_dict["decay"], state_dict["num_updates"]
        check_fraction(decay, "decay", CheckpointError)
        if not (num_updates is None or isinstance(num_updates, int)):
            raise CheckpointError(f"'num_updates' of the state is {num_updates!r}: expected an int")
        weights = [reference() for reference in self._references]
        alive = [one.device for one in weights if one is not None]
        saved = state_dict["shadow_params"]
        devices = alive if len(alive) == len(weights) else None
        shadow = load_list(saved, self._shadow, "shadow_params", devices)
        collected = state_dict.get("collected_params")
        if collected is not None:
            collected = load_list(collected, self._shadow, "collected_params", devices)
        self.decay, self.num_updates = decay, num_updates
        self._num_calls = int(state_dict.get("num_calls") or num_updates or 0)
        self.shadow_params, self.collected_params = shadow, collected
        self._stored.forget()


class _WeakReference(weakref.ref[Tensor]):
    """A weak reference to a parameter, which is pickled as the parameter itself.

    In a pickle that also holds the model, it refers to that model's parameter after loading.
    """

    __slots__ = ()

    def __reduce__(self) -> Any:
        return _weak_reference, (self(),)

    def __deepcopy__(self, memo: Any) -> _WeakReference:
        return self


def _weak_reference(parameter: Tensor | None) -> _WeakReference:
    return _WeakReference(torch.empty(0) if parameter is None else parameter)
