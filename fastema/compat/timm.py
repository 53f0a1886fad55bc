"""``ModelEma``, ``ModelEmaV2`` and ``ModelEmaV3`` of timm (1.0.31), on this package's kernels.

timm itself is not needed. Its ``CheckpointSaver``, ``load_checkpoint(use_ema=True)`` and
``unwrap_model`` take these classes as they take its own.

Notes
-----
Where it differs:

- Theirs: averages tied weights once for each name: 0.19 in place of 0.10 at decay 0.9; here: once.
- Theirs: ``ModelEma``, ``ModelEmaV2`` truncate integer buffers; here: exact.
- Theirs: pairs tensors by position; here: by name.
- Theirs: stochastic bits are lost on resumption; here: with ``update(model, step=...)`` the same.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fastema.compat.averager import duplicate
from fastema.compat.modules import ModuleAverager, frozen_copy
from fastema.compat.shares import refuse_no_share
from fastema.engine.interrupts import defer_signals
from fastema.errors import CheckpointError, LayoutError

__all__ = ["ModelEma", "ModelEmaV2", "ModelEmaV3"]

_logger = logging.getLogger(__name__)


class _TimmAverager(ModuleAverager):
    """Counts the step that random bits depend on, too."""

    step = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (), {"step": self.step}

    def update(self, averaged: nn.Module, model: nn.Module, decay: float, **settings: Any) -> None:
        """``avg = decay * avg + (1 - decay) * x``."""
        refuse_no_share(decay, "decay")
        averager = self.of(averaged, model, **settings)
        with defer_signals():  # an update is done and counted, or neither
            averager.update(model, 1.0 - decay, self.step)
            self.step += 1


class ModelEma:
    """timm's first class: a copy of a model with the average of all that is in its state.

    ``ema = decay * ema + (1 - decay) * x`` for parameters and persistent buffers of floats; others
    are copied. The copy is in evaluation mode, and its parameters need no gradient.

    Parameters
    ----------
    model : torch.nn.Module
        Is deep-copied, to ``ema``, also called ``module``.
    decay : float
        Weight of the old average; may be changed between steps.
    device : str
        Where the average is kept; empty for where the model is.
    resume : str
        A checkpoint file of timm's training script, whose ``state_dict_ema`` is loaded; empty for
        none. A CheckpointError if it holds no dict.

    Attributes
    ----------
    ema_has_module : bool
        Whether the copy is of a data parallel wrapper.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        device: Any = "",
        resume: str | PathLike[str] = "",
    ) -> None:
        self.ema = frozen_copy(model).eval()
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
        # timm's checkpoints hold the arguments of the script beside the weights. Before torch 2.5
        # there is no way to allow for them.
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
        """Take the weights of a model, wrapped or on another device too, into the average.

        A LayoutError, DTypeError or BridgeError names the tensors; nothing was written then.
        """
        self._averager.update(self.ema, model, self.decay)


class _Module(nn.Module):
    """A module around the averaged copy of another."""

    def __init__(
        self, model: nn.Module, decay: float, device: Any, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.module = duplicate(model).eval()
        self.decay = decay
        self.device = device
        if device is not None:
            self.module.to(device=device)
        if dtype is not None:
            self.module.to(dtype=dtype)
        self._averager = _TimmAverager()

    def _settings(self, exclude_buffers: bool = False) -> dict[str, Any]:
        """Return keywords for :meth:`ModuleAverager.of`, from the attributes as they are now."""
        return {}

    def set(self, model: nn.Module) -> None:
        """Make the average the weights of a model; raises as :meth:`ModelEma.update`."""
        self._averager.of(self.module, model, **self._settings()).copy(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged copy."""
        return self.module(*args, **kwargs)


class ModelEmaV2(_Module):
    """timm's second class: a module around a copy of a model, with the average of its state.

    ``ema = decay * ema + (1 - decay) * x`` for parameters and persistent buffers of floats; others
    are copied. Parameters are those of :class:`ModelEma`; the copy is ``module``.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, device: Any = None) -> None:
        super().__init__(model, decay, device)

    @torch.no_grad()
    def _update(self, model: nn.Module, update_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        # Subclasses in the wild call this with functions of their own.
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
        """Take the weights of a model into the average; see :meth:`ModelEma.update`."""
        if self._is_overridden():
            self._update(model, lambda ema, new: self.decay * ema + (1.0 - self.decay) * new)
        else:
            self._averager.update(self.module, model, self.decay)

    def set(self, model: nn.Module) -> None:
        """Make the average the weights of a model; raises as :meth:`update`."""
        if self._is_overridden():
            self._update(model, lambda ema, new: new)
        else:
            super().set(model)

    def _is_overridden(self) -> bool:
        # timm's own goes through the method, so subclasses have what they do in it.
        return type(self)._update is not ModelEmaV2._update


class ModelEmaV3(_Module):
    """timm's third class: a module around a copy of a model, with the average of its state.

    ``ema += (1 - d) * (x - ema)`` for parameters and persistent buffers of floats, in one call;
    other persistent buffers are copied. The decay ``d`` is :meth:`get_decay`'s; where it is 0 the
    average is the weights, also over a NaN.

    Parameters
    ----------
    model : torch.nn.Module
        Is deep-copied, to ``module``, in evaluation mode.
    decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power
        See :meth:`get_decay`. Attributes like all that follow; but for ``device`` and ``dtype``
        they may be changed between steps.
    device, dtype : optional
        Of the average, for ``dtype`` of its floats; by default those of the model.
    stochastic_rounding : bool
        Round 16-bit averages, float16 too, at random, otherwise to nearest.
    stochastic_rounding_seed : int
        Of the random bits, which also depend on the step, the tensor's name, and the element's
        place in the tensor. A resumed run has the same if ``update`` is given the step.
    foreach : bool
        Without effect: every update is one call.
    exclude_buffers : bool
        Copy all buffers, also those that are not persistent, instead of averaging them.

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
        """The decay at a step of the training, counted from 0.

        With ``n = step - update_after_step - 1`` it is 0 where ``n <= 0``; ``decay`` without
        warm-up, or without a step; else ``1 - (1 + n / warmup_gamma) ** -warmup_power``, at most
        ``decay`` and at least ``min_decay``.
        """
        refuse_no_share(self.decay, "decay")
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
        """Take the weights of a model into the average; raises as :meth:`ModelEma.update`.

        The decay and random bits depend on ``step``, of the training, from 0.
        """
        decay = self.get_decay(step)
        if step is not None:
            self._averager.step = max(0, int(step)) % 2**63
        if self.exclude_buffers:
            self.apply_update_no_buffers_(model, decay)
        else:
            self.apply_update_(model, decay)

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """One update, of parameters and buffers, with a given decay; raises as :meth:`update`."""
        self._averager.update(self.module, model, decay, **self._settings())

    def apply_update_no_buffers_(self, model: nn.Module, decay: float) -> None:
        """One update with a given decay, in which buffers are copied; raises as :meth:`update`."""
        self._averager.update(self.module, model, decay, **self._settings(exclude_buffers=True))

    def _settings(self, exclude_buffers: bool = False) -> dict[str, Any]:
        return {
            "buffers": "copy" if exclude_buffers else "saved",
            "rounding": "stochastic" if self.stochastic_rounding else "nearest",
            # torch's generators take negative seeds as well.
            "seed": int(self.stochastic_rounding_seed) % 2**63,
        }
