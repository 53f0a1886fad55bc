"""The classes and functions of this package."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fastema.compat.averager import copy_model
from fastema.compat.modules import ModuleAverager, copy_frozen
from fastema.compat.shares import check_fraction
from fastema.engine.interrupts import defer_signals
from fastema.errors import CheckpointError, LayoutError

__all__ = ["ModelEma", "ModelEmaV2", "ModelEmaV3"]

_logger = logging.getLogger(__name__)


class _TimmAverager(ModuleAverager):
    """An averager that also counts the step, on which random bits depend."""

    step = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (), {"step": self.step}

    def update(self, averaged: nn.Module, model: nn.Module, decay: float, **settings: Any) -> None:
        """Compute ``avg = decay * avg + (1 - decay) * x``."""
        check_fraction(decay, "decay")
        averager = self.of(averaged, model, **settings)
        with defer_signals():  # an interrupt never separates an update from its count
            averager.update(model, 1.0 - decay, self.step)
            self.step += 1


class ModelEma:
    """timm's first class: a copy of a model with the average of its state dict.

    ``ema = decay * ema + (1 - decay) * x`` for floating-point parameters and persistent buffers;
    others are copied. The copy is in evaluation mode, and its parameters require no gradient.

    Parameters
    ----------
    model : torch.nn.Module
        Model to average; deep-copied to ``ema``, also available as ``module``.
    decay : float
        Weight of the old average, in [0, 1]; may be changed between steps. Default 0.9999.
    device : str
        Device of the average; empty (default) for the model's.
    resume : str
        Checkpoint file of timm's training script, whose ``state_dict_ema`` is loaded; empty
        (default) for none. Raise a CheckpointError if the file holds no dict.

    Attributes
    ----------
    ema_has_module : bool
        Whether the copied model is a data-parallel wrapper.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        device: Any = "",
        resume: str | PathLike[str] = "",
    ) -> None:
        self.ema = copy_frozen(model).eval()
        self.decay = decay
        self.device = device
        if device:
            self.ema.to(device=device)
        self.ema_has_module = hasattr(self.ema, "module")
        self._averager = _TimmAverager()
        if resume:
            self._load_checkpoint(resume)

    @property
    def module(self) -> nn.Module:
        """The averaged copy: timm's ``unwrap_model`` and ``CheckpointSaver`` look for it here."""
        return self.ema

    def _load_checkpoint(self, checkpoint_path: str | PathLike[str]) -> None:
        # timm's checkpoints also hold the script's arguments. Torch before 2.5 cannot allow them.
        allowed = getattr(torch.serialization, "safe_globals", None)
        with nullcontext() if allowed is None else allowed([argparse.Namespace]):
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise CheckpointError(
                f"{checkpoint_path}: expected a dict with 'state_dict_ema', as timm's training "
                f"script saves it, got a {type(checkpoint).__name__}"
            )
        if "state_dict_ema" not in checkpoint:
            _logger.warning(
                "%s has no 'state_dict_ema'; the average begins as the model", checkpoint_path
            )
            return
        state = checkpoint["state_dict_ema"]
        if self.ema_has_module:
            state = {f"module.{name.removeprefix('module.')}": one for name, one in state.items()}
        self.ema.load_state_dict(state)
        _logger.info("loaded 'state_dict_ema' of %s", checkpoint_path)

    def update(self, model: nn.Module) -> None:
        """Update the average from a model, which may be wrapped or on another device.

        Raise a LayoutError, DTypeError or BridgeError that names tensors that do not match, and an
        ArgumentError for a decay outside [0, 1]. Nothing is written then.
        """
        self._averager.update(self.ema, model, self.decay)


class _AveragedCopy(nn.Module):
    """A module around the averaged copy of a model."""

    def __init__(
        self, model: nn.Module, decay: float, device: Any, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.module = copy_model(model).eval()
        self.decay = decay
        self.device = device
        if device is not None:
            self.module.to(device=device)
        if dtype is not None:
            self.module.to(dtype=dtype)
        self._averager = _TimmAverager()

    def _settings(self, exclude_buffers: bool = False) -> dict[str, Any]:
        """Return keyword arguments for :meth:`ModuleAverager.of` from the current attributes."""
        return {}

    def set(self, model: nn.Module) -> None:
        """Copy a model's weights into the average; raise the errors of :meth:`ModelEma.update`."""
        self._averager.of(self.module, model, **self._settings()).copy(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged copy."""
        return self.module(*args, **kwargs)


class ModelEmaV2(_AveragedCopy):
    """timm's second class: a module around a copy of a model, with the average of its state dict.

    ``ema = decay * ema + (1 - decay) * x`` for floating-point parameters and persistent buffers;
    others are copied. For the parameters see :class:`ModelEma`; the copy is ``module``.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, device: Any = None) -> None:
        super().__init__(model, decay, device)

    @torch.no_grad()
    def _update(self, model: nn.Module, update_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        # Users' subclasses call this with functions of their own.
        ours, theirs = self.module.state_dict(), model.state_dict()
        if len(ours) != len(theirs):
            raise LayoutError(
                f"the model's state has {len(theirs)} tensors, the average's {len(ours)}"
            )
        found: list[tuple[Tensor, Tensor]] = []
        for average, new in zip(ours.values(), theirs.values(), strict=True):
            new = new.to(device=average.device)
            floats = average.is_floating_point() or average.is_complex()
            found.append((average, update_fn(average, new) if floats else new))
        for average, new in found:
            average.copy_(new)

    def update(self, model: nn.Module) -> None:
        """Update the average from a model; see :meth:`ModelEma.update`."""
        if self._is_overridden():
            self._update(model, lambda ema, new: self.decay * ema + (1.0 - self.decay) * new)
        else:
            self._averager.update(self.module, model, self.decay)

    def set(self, model: nn.Module) -> None:
        """Copy a model's weights into the average; raise the errors of :meth:`update`."""
        if self._is_overridden():
            self._update(model, lambda ema, new: new)
        else:
            super().set(model)

    def _is_overridden(self) -> bool:
        # timm's update() and set() call this method, so subclasses override it.
        return type(self)._update is not ModelEmaV2._update


class ModelEmaV3(_AveragedCopy):
    """timm's third class: a module around a copy of a model, with the average of its state dict.

    ``ema += (1 - d) * (x - ema)`` for floating-point parameters and persistent buffers, in one
    call; other persistent buffers are copied. :meth:`get_decay` gives the decay ``d``. If it is 0,
    the average becomes the weights, even if it held a NaN.

    Parameters
    ----------
    model : torch.nn.Module
        Model to average; deep-copied to ``module``, in evaluation mode.
    decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power
        See :meth:`get_decay`. These and all following arguments are attributes, which may be
        changed between steps, except for ``device`` and ``dtype``.
    device, dtype : optional
        Device of the average, and dtype of its floating-point tensors. Default: the model's.
    stochastic_rounding : bool
        Round 16-bit averages, including float16, at random (default). If False, round to nearest.
    stochastic_rounding_seed : int
        Seed of the random bits, which also depend on the step, the tensor's name, and the element's
        place in the tensor. A resumed run draws the same bits if ``update`` gets the step. Default
        0.
    foreach : bool
        Without effect: every update is one call.
    exclude_buffers : bool
        Copy all buffers, including non-persistent ones, instead of averaging them. Default False.

    Examples
    --------
    >>> model = nn.Linear(4, 2)
    >>> model_ema = ModelEmaV3(model, decay=0.9998, use_warmup=True)
    >>> for step in range(3):
    ...     model_ema.update(model, step=step)      # after optimizer.step()
    >>> scores = model_ema.module(torch.randn(1, 4))
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: Any = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
    ) -> None:
        super().__init__(model, decay, device, dtype)
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.use_warmup = use_warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.dtype = dtype
        self.stochastic_rounding = stochastic_rounding
        self.stochastic_rounding_seed = stochastic_rounding_seed
        self.foreach = foreach
        self.exclude_buffers = exclude_buffers

    def get_decay(self, step: int | None = None) -> float:
        """Return the decay at a training step, counted from 0.

        Without a step it is ``decay``. Otherwise, with ``n = step - update_after_step - 1``, it is
        0 if ``n <= 0``, ``decay`` without warm-up, and ``1 - (1 + n / warmup_gamma) **
        -warmup_power`` with it, at most ``decay`` and at least ``min_decay``. Raise an
        ArgumentError if ``decay`` is outside [0, 1].
        """
        check_fraction(self.decay, "decay")
        if step is None:
            return self.decay
        passed = step - self.update_after_step - 1
        if passed <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        grown: float = 1.0 - (1.0 + passed / self.warmup_gamma) ** -self.warmup_power
        return max(min(grown, self.decay), self.min_decay)

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Update the average from a model; raise the errors of :meth:`ModelEma.update`.

        The decay and the random bits depend on ``step``, the training step counted from 0.
        """
        decay = self.get_decay(step)
        if step is not None:
            self._averager.step = max(0, int(step)) % 2**63
        if self.exclude_buffers:
            self.apply_update_no_buffers_(model, decay)
        else:
            self.apply_update_(model, decay)

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Average parameters and buffers with this decay; raise as :meth:`update`."""
        self._averager.update(self.module, model, decay, **self._settings())

    def apply_update_no_buffers_(self, model: nn.Module, decay: float) -> None:
        """Average parameters with this decay, and copy buffers; raise as :meth:`update`."""
        self._averager.update(self.module, model, decay, **self._settings(exclude_buffers=True))

    def _settings(self, exclude_buffers: bool = False) -> dict[str, Any]:
        return {
            "buffers": "copy" if exclude_buffers else "saved",
            "rounding": "stochastic" if self.stochastic_rounding else "nearest",
            # torch's generators accept negative seeds too.
            "seed": int(self.stochastic_rounding_seed) % 2**63,
        }
