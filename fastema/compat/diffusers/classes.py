"""The classes and functions of this package."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fastema.compat.lists import ListAverage, as_list, load_list, move_list, write
from fastema.compat.shares import check_fraction
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError, CheckpointError

__all__ = ["EMAModel"]

_KINDS: Final[dict[str, type]] = {
    "decay": Real,
    "min_decay": Real,
    "optimization_step": Integral,
    "update_after_step": Integral,
    "use_ema_warmup": bool,
    "inv_gamma": Real,
    "power": Real,
}
"""Entries of a state besides the tensors, with their types; a saved model's configuration has them.
"""

_RENAMED: Final = {"max_value": "decay", "min_value": "min_decay", "device": "to()"}
"""Deprecated arguments, and the replacements that diffusers recommends."""


class EMAModel(ListAverage):
    """Exponential moving average of parameters, with the names and the state of diffusers' class.

    Each step computes ``shadow += (1 - d) * (x - shadow)`` in float32 (float64 if either side is
    float64), with the decay ``d`` of :meth:`get_decay`.

    Parameters
    ----------
    parameters : iterable of Tensor
        Parameters to average, such as ``model.parameters()``, of any shapes and dtypes. Parameters
        that require no gradient, and integers, are copied at each step. No reference is kept.
    decay, min_decay : float
        Highest weight of the old average, and the lowest from the second step after
        ``update_after_step`` on; in [0, 1], otherwise an ArgumentError. Defaults 0.9999 and 0.0.
        The decay is constant only with ``min_decay=decay``.
    update_after_step : int
        Up to the step after this one, the average is a copy of the parameters. Default 0.
    use_ema_warmup : bool
        Let the decay grow as a power of the step. Default False.
    inv_gamma, power : float
        Scale and exponent of that growth. Defaults 1.0 and 2/3. ``inv_gamma=1`` and ``power=1``
        give the mean of all weights; 2/3 reaches 0.999 after 31,600 steps, 3/4 after 10,000.
    foreach : bool
        Accepted and stored; all tensors are updated in one call in any case.
    model_cls, model_config : type, dict
        Class and configuration of the diffusers model, for :meth:`save_pretrained`.
    **kwargs
        Arguments that diffusers has deprecated work with a ``FutureWarning``, as does a module as
        ``parameters``; other arguments are ignored, with a warning.

    Attributes
    ----------
    optimization_step, cur_decay_value : int, float or None
        Number of steps so far, and the decay of the latest step.
    shadow_params, temp_stored_params : list of Tensor
        The averages, and the copies that :meth:`store` keeps in host memory, if any.

    Notes
    -----
    All arguments but ``parameters`` are attributes that may be set between steps. Random bits are a
    function of ``optimization_step``, the parameter's place in the list and the element's place in
    the tensor. Differences from diffusers 0.42.1 beyond those in ``docs/drop-in.md``:
    :meth:`load_state_dict` copies the tensors to the devices of the current averages; a
    ``min_decay`` of 0, an ``int``, can be saved and loaded again; averages on another device than
    the parameters are updated there.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
    >>> ema = EMAModel([weight], decay=0.75, min_decay=0.75)
    >>> for _ in range(2):
    ...     weight.data += 1.0
    ...     ema.step([weight])
    >>> ema.shadow_params, ema.cur_decay_value
    ([tensor([3.2500])], 0.75)
    """

    temp_stored_params: list[Tensor] | None
    _stored_as = "temp_stored_params"
    _stored_on = "cpu"

    def __init__(
        self,
        parameters: Iterable[Tensor],
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float | int = 1.0,
        power: float | int = 2 / 3,
        foreach: bool = False,
        model_cls: Any | None = None,
        model_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(parameters, torch.nn.Module):
            _deprecated("a torch.nn.Module", "EMAModel", "its parameters()")
            parameters, use_ema_warmup = parameters.parameters(), True
        unknown = sorted(kwargs.keys() - _RENAMED.keys())
        if unknown:
            warnings.warn(f"EMAModel ignores {', '.join(unknown)}", stacklevel=2)
        given = {name: value for name, value in kwargs.items() if value is not None}
        for name, instead in _RENAMED.items():
            if name in given:
                _deprecated(name, "EMAModel", instead)
        decay, min_decay = given.get("max_value", decay), given.get("min_value", min_decay)
        check_fraction(decay, "decay")
        check_fraction(min_decay, "min_decay")
        super().__init__(as_list(parameters, "EMAModel(parameters)"))
        if "device" in given:
            self.to(device=given["device"])
        self.decay = decay
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.use_ema_warmup = use_ema_warmup
        self.inv_gamma = inv_gamma
        self.power = power
        self.optimization_step = 0
        self.cur_decay_value: float | None = None
        self.foreach = foreach
        self.model_cls = model_cls
        self.model_config = model_config

    def get_decay(self, optimization_step: int) -> float:
        """Return the weight of the old average at a step, counted from 1.

        With ``s = max(0, step - update_after_step - 1)`` it is 0 if ``s = 0``. Otherwise it is
        ``1 - (1 + s / inv_gamma) ** -power`` with ``use_ema_warmup``, and ``(1 + s) / (10 + s)``
        without; at most ``decay`` and at least ``min_decay``.
        """
        step = max(0, optimization_step - self.update_after_step - 1)
        if not step:
            return 0.0
        if self.use_ema_warmup:
            grown = 1 - (1 + step / self.inv_gamma) ** -self.power
        else:
            grown = (1 + step) / (10 + step)
        return max(min(grown, self.decay), self.min_decay)

    def step(self, parameters: Iterable[Tensor]) -> None:
        """Update the average from the current parameters; call it after ``optimizer.step()``.

        Each call checks which parameters require a gradient. Raise an ArgumentError if they are not
        tensors, and a LayoutError, DTypeError or BridgeError if their number, shapes or kinds do
        not match the average. Nothing is changed then.
        """
        if isinstance(parameters, torch.nn.Module):
            _deprecated("a torch.nn.Module", "EMAModel.step", "its parameters()")
            parameters = parameters.parameters()
        weights = self._checked_parameters(parameters, "step")
        step = self.optimization_step + 1
        decay = float(self.get_decay(step))
        frozen = frozenset(at for at, one in enumerate(weights) if not one.requires_grad)
        with defer_signals():  # an interrupt never separates an update from its count
            self._averager.update(self._shadow, weights, 1 - decay, step, frozen)
            self.optimization_step, self.cur_decay_value = step, decay

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Write the weights that :meth:`store` kept back, bit for bit, and drop the copies."""
        super().restore(parameters)
        self.temp_stored_params = None

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Move the averages to a device, and cast floating-point averages to a dtype.

        Averages on another device than the parameters cost a copy of the parameters at each step.
        A ``non_blocking`` copy from a GPU to the host is complete after a synchronization with the
        GPU, which :meth:`step` makes.
        """
        self.shadow_params = move_list(self.shadow_params, device, dtype, non_blocking)

    def pin_memory(self) -> None:
        """Move the averages to pinned host memory, which a GPU copies to asynchronously."""
        self.shadow_params = [one.pin_memory() for one in self.shadow_params]

    def state_dict(self) -> dict[str, Any]:
        """Return counters, schedule and averages: the tensors themselves, not copies."""
        state = {name: getattr(self, name) for name in _KINDS}
        # diffusers accepts an int in its constructor, but not in load_state_dict().
        state["min_decay"] = float(self.min_decay)
        return {**state, "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load copies of a saved average, of this class or of diffusers'; keep missing entries.

        Raise a CheckpointError if an entry has the wrong type or range, and a LayoutError that
        lists tensors that do not match. Nothing is changed then.
        """
        found = {name: state_dict.get(name, getattr(self, name)) for name in _KINDS}
        for name, value in found.items():
            if not isinstance(value, _KINDS[name]):
                raise CheckpointError(
                    f"{name!r} of the state is {value!r}: expected {_KINDS[name].__name__}"
                )
        for name in ("decay", "min_decay"):
            check_fraction(found[name], name, CheckpointError)
        saved = state_dict.get("shadow_params")
        if saved is not None:
            self.shadow_params = load_list(saved, self.shadow_params, "shadow_params")
        vars(self).update(found)

    @classmethod
    def from_pretrained(cls, path: str | Path, model_cls: Any, foreach: bool = False) -> EMAModel:
        """Load an average that :meth:`save_pretrained` of this class or of diffusers' wrote.

        Raise a CheckpointError if an entry of the configuration has the wrong type or range.
        """
        config = model_cls.load_config(path)
        model = model_cls.from_pretrained(path)
        ema = cls(
            model.parameters(), model_cls=model_cls, model_config=model.config, foreach=foreach
        )
        ema.load_state_dict({name: config[name] for name in _KINDS if name in config})
        return ema

    def save_pretrained(self, path: str | Path) -> None:
        """Save the average as a diffusers model, with counters and schedule in its ``config.json``.

        Raise an ArgumentError without ``model_cls`` or ``model_config``, and a LayoutError if the
        average does not fit that model. Nothing is written then.
        """
        for name in ("model_cls", "model_config"):
            if getattr(self, name) is None:
                raise ArgumentError(f"save_pretrained(): EMAModel was built without {name}")
        assert self.model_cls is not None
        model = self.model_cls.from_config(self.model_config)
        counters = self.state_dict()
        del counters["shadow_params"]
        model.register_to_config(**counters)
        write(self.shadow_params, list(model.parameters()), "save_pretrained")
        model.save_pretrained(path)


def _deprecated(what: str, where: str, instead: str) -> None:
    warnings.warn(
        f"{what} given to {where} is deprecated in diffusers: use {instead}",
        FutureWarning,
        stacklevel=3,
    )
