"""MMEngine's averaged models, and the averages in its checkpoints.

Notes
-----
Where it differs:

- Theirs: ``interval=n`` makes the horizon n times as long; here: uses a decay of
  ``(1 - momentum) ** n`` (*).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from fastema.checkpoint.transfer import (
    check_mapping,
    find_mismatches,
    load_modules,
    strip_wrapper_prefixes,
)
from fastema.compat.averager import ModelAverager
from fastema.compat.lists import find_distinct
from fastema.compat.mirrored import MirroredNumber
from fastema.compat.modules import ModuleAverager, copy_frozen
from fastema.compat.shares import check_fraction
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError, CheckpointError, LayoutError, format_problems
from fastema.layout.spec import Role
from fastema.rules.checks import validate_int

__all__ = [
    "BaseAveragedModel",
    "ExponentialMovingAverage",
    "MomentumAnnealingEMA",
    "StochasticWeightAverage",
    "export",
    "load",
]

_INSIDE: Final = "module."


def _buffers_only(name: str, role: Role) -> Literal["copy", "skip"]:
    return "copy" if role == "buffer" else "skip"


class BaseAveragedModel(nn.Module):
    """A copy of a model that holds its average: the base class of MMEngine's averages.

    The first update copies the model; after it, every ``interval``-th update averages. Your own
    subclass implements ``avg_func``, which is then called for each tensor.

    Parameters
    ----------
    model : torch.nn.Module
        Model to average; deep-copied to ``module``, without gradients.
    interval : int
        Average at every ``interval``-th update; at least 1, otherwise an ArgumentError. Default 1.
    device : torch.device, optional
        Device of the average. Default: the model's.
    update_buffers : bool
        Also average the buffers in the state dict. If False (default), copy all buffers at each
        update. May be changed between updates.

    Attributes
    ----------
    steps : Tensor
        int64 buffer: number of updates so far.

    Notes
    -----
    Interface, numbers and state dicts (``steps`` and ``module.*``) are those of
    ``mmengine/model/averaged_model.py``, version 0.10.7. MMEngine reads ``steps`` from the device
    at each update, and after :meth:`to` keeps averaging the buffers' old tensors; this class does
    neither. Random bits are a function of ``steps``, the name and the element. With an ``interval``
    of k, :class:`ExponentialMovingAverage` and :class:`MomentumAnnealingEMA` average with
    ``1 - (1 - momentum) ** k``; ``peer_exact=True`` uses the peer's ``momentum``.
    """

    steps: Tensor

    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
    ) -> None:
        super().__init__()
        self.module = copy_frozen(model)
        self.interval = validate_int(interval, "interval", 1)
        if device is not None:
            self.module = self.module.to(device)
        self.register_buffer("steps", torch.tensor(0, dtype=torch.long, device=device))
        self.update_buffers = update_buffers
        self._averager = ModuleAverager()
        self._copier = ModelAverager(self.module, _buffers_only)
        self._count = MirroredNumber()

    @property
    def avg_parameters(self) -> dict[str, Tensor]:
        """The averaged tensors by their names in :attr:`module`."""
        if self.update_buffers:
            return dict(self.module.state_dict())
        return dict(self.module.named_parameters())

    @abstractmethod
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Any) -> None:
        """Update a tensor's average in place, after ``steps`` (int or Tensor) updates."""

    def _weight(self, steps: int) -> float | None:
        """Return the weight of the new value after ``steps`` updates; None to use ``avg_func``."""
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged model."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average from a model on any device; call it after each optimizer step.

        Raise a LayoutError that names tensors that only one of the two has, or whose shapes differ.
        Nothing is written or counted then.
        """
        done = int(self._count.read(self.steps))
        buffers: Literal["saved", "copy"] = "saved" if self.update_buffers else "copy"
        averager = self._averager.of(self.module, buffers=buffers)
        with defer_signals():  # an interrupt never separates an update from its count
            if done == 0:
                averager.copy(model)
            elif done % self.interval == 0:
                weight = self._weight(done)
                if weight is None:
                    self._call_avg_func(model)
                else:
                    averager.update(model, weight, done)
            elif not self.update_buffers and any(True for _ in self.module.buffers()):
                self._copier.copy(model)
            self._count.increment(self.steps)

    def _call_avg_func(self, model: nn.Module) -> None:
        averages, sources = self._averaged_of(self.module), self._averaged_of(model)
        problems = find_mismatches(averages, sources)
        if problems:
            raise LayoutError(
                "the model's tensors do not match the average:\n" + format_problems(problems)
            )
        if not self.update_buffers:
            self._copier.copy(model)
        names = list(averages)
        for at in find_distinct(averages.values()):
            average = averages[names[at]]
            source = sources[names[at]].data.to(average.device)
            if average.is_floating_point() or average.is_complex():
                self.avg_func(average.data, source, self.steps)
            else:
                average.copy_(source)

    def _averaged_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a model's tensors to average, by all their names without wrappers' prefixes."""
        found: Mapping[str, Any]
        if self.update_buffers:
            found = model.state_dict()
        else:
            found = dict(model.named_parameters(remove_duplicate=False))
        return strip_wrapper_prefixes(
            {k: one for k, one in found.items() if isinstance(one, Tensor)}
        )


class _LerpAverage(BaseAveragedModel):
    """Base of averages that compute ``averaged += share * (x - averaged)`` in one kernel call."""

    def _new_weight(self, steps: int) -> float:
        """Return the weight of the new value after ``steps`` updates."""
        raise NotImplementedError

    def _weight(self, steps: int) -> float | None:
        is_own = type(self).avg_func is _LerpAverage.avg_func and "avg_func" not in vars(self)
        return self._new_weight(steps) if is_own else None

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Any) -> None:
        """Update a tensor's average in place, after ``steps`` (int or Tensor) updates."""
        averaged_param.lerp_(source_param, self._new_weight(int(steps)))


class StochasticWeightAverage(_LerpAverage):
    """The mean of a model's weights at every ``interval``-th update: MMEngine's SWA.

    ``average += (x - average) / (steps // interval + 1)`` (Izmailov et al., 2018,
    https://arxiv.org/abs/1803.05407). The parameters are those of :class:`BaseAveragedModel`.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> average = StochasticWeightAverage(model)
    >>> average.update_parameters(model)            # after each optimizer step, or epoch
    >>> sorted(average.state_dict())
    ['module.bias', 'module.weight', 'steps']
    """

    def _new_weight(self, steps: int) -> float:
        return 1.0 / (steps // self.interval + 1)


class ExponentialMovingAverage(_LerpAverage):
    """MMEngine's exponential moving average of a model, with ``momentum = 1 - decay``.

    ``average += momentum * (x - average)``. For use in an MMEngine configuration, register it in
    place of MMEngine's class:
    ``MODELS.register_module(module=ExponentialMovingAverage, force=True)``.

    Parameters
    ----------
    model, interval, device, update_buffers
        See :class:`BaseAveragedModel`, also for the differences from MMEngine.
    momentum : float
        Weight of the *new* value, in (0, 1), otherwise an ArgumentError. Default 0.0002. A value
        above 0.5 is most likely a decay, and gives a UserWarning.
    peer_exact : bool
        Average with ``momentum`` itself at every ``interval``-th update, as MMEngine does. Set it
        to continue an MMEngine run with an ``interval`` above 1. Default False.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> average = ExponentialMovingAverage(model, momentum=0.001)
    >>> average.update_parameters(model)            # after each optimizer step
    >>> int(average.steps)
    1
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
        *,
        peer_exact: bool = False,
    ) -> None:
        check_fraction(momentum, "momentum")
        if not 0.0 < momentum < 1.0:
            raise ArgumentError(f"momentum={momentum!r}: expected a number in (0, 1), 1 - decay")
        if momentum > 0.5:
            warnings.warn(
                f"momentum={momentum}: it is the weight of the new value here, 1 - decay, and "
                "usually small",
                stacklevel=2,
            )
        super().__init__(model, interval, device, update_buffers)
        self.momentum = momentum
        self.peer_exact = peer_exact

    def _momentum(self, steps: int) -> float:
        return self.momentum

    def _new_weight(self, steps: int) -> float:
        momentum = self._momentum(steps)
        if self.peer_exact or self.interval == 1:
            return momentum
        return 1.0 - (1.0 - momentum) ** self.interval


class MomentumAnnealingEMA(ExponentialMovingAverage):
    """MMEngine's exponential moving average whose momentum decreases to its final value.

    ``average += m * (x - average)`` with ``m = max(momentum, gamma / (gamma + steps))``.

    Parameters
    ----------
    model, momentum, interval, device, update_buffers, peer_exact
        See :class:`ExponentialMovingAverage`; ``momentum`` is the final value.
    gamma : int
        Number of updates after which ``gamma / (gamma + steps)`` is 1/2; above 0, otherwise an
        ArgumentError. Default 100.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: int = 100,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
        *,
        peer_exact: bool = False,
    ) -> None:
        if not gamma > 0:
            raise ArgumentError(f"gamma={gamma!r}: expected a number above 0")
        super().__init__(model, momentum, interval, device, update_buffers, peer_exact=peer_exact)
        self.gamma = gamma

    def _momentum(self, steps: int) -> float:
        return max(self.momentum, self.gamma / (self.gamma + steps))


def _exchange_tensors(
    state: Mapping[str, Any], ema_state: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both state dicts with the tensors of the average and of the weights exchanged."""
    weights, averages = dict(state), dict(ema_state)
    names = [name for name in averages if name.startswith(_INSIDE)]
    missing = [name for name in names if name.removeprefix(_INSIDE) not in weights]
    if missing:
        raise CheckpointError(
            "the average holds tensors that the weights lack:\n"
            + format_problems(map(repr, missing))
        )
    for name in names:
        inside = name.removeprefix(_INSIDE)
        averages[name], weights[inside] = weights[inside], averages[name]
    return weights, averages


def export(average: BaseAveragedModel, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the entries for an average and its model in a checkpoint of MMEngine's ``EMAHook``.

    ``"state_dict"`` holds the *average* under the model's names, ready for use;
    ``"ema_state_dict"`` holds ``steps``, and the weights in training under ``module.*``. Tensors
    are not copied. Raise a CheckpointError if the model lacks tensors of the average.
    """
    state, ema_state = _exchange_tensors(model.state_dict(), average.state_dict())
    return {"state_dict": state, "ema_state_dict": ema_state}


def load(
    average: BaseAveragedModel, checkpoint: Mapping[str, Any], model: nn.Module | None = None
) -> None:
    """Load the average of a checkpoint that MMEngine's ``EMAHook`` wrote.

    Parameters
    ----------
    average : BaseAveragedModel
        Average to load into.
    checkpoint : mapping
        Mapping with ``"state_dict"`` and ``"ema_state_dict"``, which is not changed.
    model : torch.nn.Module, optional
        Also load the weights in training into this model.

    Raises
    ------
    CheckpointError
        If an entry is missing, or tensors are not those of the model. The error names them; nothing
        is changed.
    """
    whole = check_mapping(checkpoint, "the checkpoint")
    named = {name: whole.get(name) for name in ("state_dict", "ema_state_dict")}
    if any(part is None for part in named.values()):
        raise CheckpointError(
            "the checkpoint holds no average: expected 'state_dict' and 'ema_state_dict', which "
            "MMEngine writes with an EMAHook"
        )
    state, ema_state = (check_mapping(part, f"{name!r}") for name, part in named.items())
    weights, averages = _exchange_tensors(state, ema_state)
    load_modules((average, averages), *([] if model is None else [(model, weights)]))
