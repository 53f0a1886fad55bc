"""The class of torch_ema on our kernels: ``ExponentialMovingAverage`` of a list of parameters.

Notes
-----
Where it differs:

- Theirs: ``load_state_dict`` rounds a float32 average of a bfloat16 model to bfloat16; here: keeps
  the wider dtype.
- Theirs: ``average_parameters()`` within another one loses the weights; here: both put back what
  they found.
- Theirs: ``store()`` after ``copy_to()`` loses the weights; here: an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastema.compat.lists import ListAverage, as_list, clone_list, load_list, move_list, write
from fastema.compat.shares import refuse_no_share
from fastema.engine.blocks import RestoringBlock, Steps
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError, CheckpointError

__all__ = ["ExponentialMovingAverage"]

_NARROW = torch.float16, torch.bfloat16


class ExponentialMovingAverage(ListAverage):
    """Exponential moving average of parameters, with torch_ema's names and its state.

    At the n-th update ``shadow += (1 - d) * (x - shadow)`` with ``d = min(decay, (1 + n) / (10 +
    n))``, or ``d = decay`` without ``use_num_updates``; computed in float32 (float64 where either
    side is). It begins as a copy of the parameters.

    Parameters
    ----------
    parameters : iterable of Tensor
        Such as ``model.parameters()``, of any shapes and dtypes. All of them are averaged, whether
        they require a gradient or not; integers are copied. Only weak references to them are kept.
    decay : float
        Weight of the old average, in [0, 1], else an ArgumentError; may be set between updates.
    use_num_updates : bool
        Begin with a smaller decay that grows with the number of updates.

    Attributes
    ----------
    num_updates : int or None
        Updates so far; None without ``use_num_updates``.
    shadow_params, collected_params : list of Tensor
        The averages, and what :meth:`store` stored, if any.

    Notes
    -----
    Random bits are a function of ``num_updates``, the parameter's place in the list and the
    element's in the tensor. Where it differs from torch_ema 0.3, ``docs/drop-in.md`` aside: shapes
    that differ are refused; stored weights can be copied and loaded; without ``use_num_updates``
    the state of a 16-bit average holds ``"num_calls"``. It can be pickled: with the model it goes
    on with that model's parameters; by itself, each call has to be given the parameters.

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
        refuse_no_share(decay, "decay")
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
                "average was built from no longer exist; give the parameters, or keep their model"
            )
        return alive

    def update(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Take the current parameters into the average; call it after ``optimizer.step()``.

        Parameters
        ----------
        parameters : iterable of Tensor, optional
            By default those that the average was built from; an ArgumentError if some are gone.

        Raises
        ------
        LayoutError, DTypeError, BridgeError, ArgumentError
            For parameters of another number, shape or kind, or no tensors; nothing was changed.
        """
        decay = float(self.decay)
        step = self._num_calls + 1
        if self.num_updates is not None:
            step = self.num_updates + 1
            decay = min(decay, (1 + step) / (10 + step))
        weights = self._get_parameters(parameters, "update")
        with defer_signals():  # an update is done and counted, or neither
            self._averager.update(self._shadow, weights, 1.0 - decay, step)
            self._num_calls = step
            if self.num_updates is not None:
                self.num_updates = step

    def copy_to(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Write the average into parameters, rounded to their dtypes; raises as :meth:`update`."""
        super().copy_to(self._get_parameters(parameters, "copy_to"))

    def store(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Keep a copy of parameters for :meth:`restore`; raises as :meth:`update`.

        A StateError where weights would be lost that :meth:`copy_to` has written over.
        """
        super().store(self._get_parameters(parameters, "store"))

    def restore(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Write what :meth:`store` kept into parameters, again and again if need be.

        Raises as :meth:`update`, and a StateError without :meth:`store`.
        """
        self._stored.stored_weights(self)
        super().restore(self._get_parameters(parameters, "restore"))

    def average_parameters(
        self, parameters: Iterable[Tensor] | None = None
    ) -> RestoringBlock[None]:
        """A block in which the parameters hold the average; the weights come back however it ends.

        A copy of the weights is kept for the block. They come back bit for bit, also into
        parameters that were moved, cast or re-pointed inside it. Raises as :meth:`update`.
        """

        def prepare() -> Steps[None]:
            weights = self._get_parameters(parameters, "average_parameters")
            raw = clone_list(weights)
            return Steps(
                lambda: write(self._shadow, weights, "average_parameters"),
                lambda: write(raw, weights, "the raw weights"),
            )

        return RestoringBlock(prepare)

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Move averages and stored weights to a device; cast those that are floats.

        Averages that are not where the parameters are cost a copy of the parameters at each update.
        """
        shadow = move_list(self._shadow, device, dtype)
        if self.collected_params is not None:
            self.collected_params = move_list(self.collected_params, device, dtype)
        self.shadow_params = shadow

    def state_dict(self) -> dict[str, Any]:
        """The decay, the number of updates and the tensors themselves, not copies of them."""
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
        """Take over copies of a saved average, of this class or of torch_ema's.

        They come to lie where the parameters are (the present averages, if those are gone), in the
        wider of the dtypes that they and the present averages have. A CheckpointError if an entry
        is missing or is not what it should be, a LayoutError that lists the tensors that differ.
        """
        missing = [k for k in ("decay", "num_updates", "shadow_params") if k not in state_dict]
        if missing:
            raise CheckpointError(f"the state has no {', '.join(map(repr, missing))}")
        decay, num_updates = state_dict["decay"], state_dict["num_updates"]
        refuse_no_share(decay, "decay", CheckpointError)
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
    """A weak reference to a parameter; pickled, the parameter itself.

    In a pickle that has the model too, the reference leads to the parameter of that model again.
    """

    __slots__ = ()

    def __reduce__(self) -> Any:
        return _weak_reference, (self(),)

    def __deepcopy__(self, memo: Any) -> _WeakReference:
        return self


def _weak_reference(parameter: Tensor | None) -> _WeakReference:
    return _WeakReference(torch.empty(0) if parameter is None else parameter)
