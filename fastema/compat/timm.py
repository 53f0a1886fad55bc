"""``ModelEma``, ``ModelEmaV2`` and ``ModelEmaV3`` of timm (1.0.31), on this package's kernels.

>>> import torch
>>> from fastema.compat.timm import ModelEmaV3
>>> model = torch.nn.Linear(4, 2)
>>> model_ema = ModelEmaV3(model, decay=0.9998, use_warmup=True)
>>> for step in range(3):
...     model_ema.update(model, step=step)  # after optimizer.step()
>>> scores = model_ema.module(torch.randn(1, 4))

timm itself is not needed. Its ``CheckpointSaver``, ``load_checkpoint(use_ema=True)`` and
``unwrap_model`` take these classes as they take its own.
"""

from __future__ import annotations

import argparse
import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastema.bridges.names import plain_names
from fastema.compat.following import Follower, duplicate
from fastema.compat.shares import refuse_no_share
from fastema.errors import CheckpointError, LayoutError

__all__ = ["ModelEma", "ModelEmaV2", "ModelEmaV3"]

_logger = logging.getLogger(__name__)


# -- what all of them do --------------------------------------------------------------------------


def _persistence(module: nn.Module) -> dict[str, bool]:
    """Whether each buffer is part of the state, by the names that an average goes by."""
    kept: dict[str, bool] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, _ in part.named_buffers(recurse=False, remove_duplicate=False):
            path = f"{prefix}.{name}" if prefix else name
            kept[path] = name not in part._non_persistent_buffers_set
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    plain = zip(plain_names(names), names, strict=True)
    return {short: kept[name] for short, name in plain if name in kept}


class _Policy:
    """All that is in the state is averaged; or the parameters, and every buffer is copied."""

    def __init__(self, averaged: nn.Module, exclude_buffers: bool) -> None:
        self._averaged, self._exclude_buffers = averaged, exclude_buffers
        self._persistent: dict[str, bool] = {}
        self.model: weakref.ref[nn.Module] | None = None

    def __call__(self, name: str, role: str) -> Literal["average", "copy", "skip"]:
        if role != "buffer":
            return "average"
        if self._exclude_buffers:
            return "copy"
        if name not in self._persistent:
            model = None if self.model is None else self.model()
            theirs = {} if model is None else _persistence(model)
            self._persistent = {**theirs, **_persistence(self._averaged)}
        return "average" if self._persistent[name] else "skip"


class _Bound(NamedTuple):
    """A follower, and what it was made for."""

    averaged: nn.Module
    settings: dict[str, Any]
    policy: _Policy
    follower: Follower


class _Following:
    """What makes one module follow another, and the step that random bits depend on."""

    def __init__(self) -> None:
        self.step = 0
        self._bound: _Bound | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is bound to memory: a copy looks everything up for itself."""
        return {"step": self.step, "_bound": None}

    def follower(
        self,
        averaged: nn.Module,
        model: nn.Module,
        *,
        exclude_buffers: bool = False,
        **rounding: Any,
    ) -> Follower:
        """The one for this module and these settings, which users may change between steps."""
        settings = {"exclude_buffers": exclude_buffers, **rounding}
        bound = self._bound
        if bound is None or bound.averaged is not averaged or bound.settings != settings:
            policy = _Policy(averaged, exclude_buffers)
            follower = Follower(averaged, policy, **rounding)
            self._bound = bound = _Bound(averaged, settings, policy, follower)
        bound.policy.model = weakref.ref(model)
        return bound.follower

    def update(self, averaged: nn.Module, model: nn.Module, decay: float, **settings: Any) -> None:
        """``avg = decay * avg + (1 - decay) * x``."""
        refuse_no_share(decay, "decay")
        self.follower(averaged, model, **settings).update(model, 1.0 - decay, self.step)
        self.step += 1


# -- the classes ----------------------------------------------------------------------------------


class ModelEma:
    """timm's first class: a copy of a model with the average of all that is in its state.

    ``ema = decay * ema + (1 - decay) * x`` for parameters and persistent buffers of floats; others
    are copied. The copy is in evaluation mode, and its parameters need no gradient.

    Parameters
    ----------
    model : torch.nn.Module
        Is deep-copied.
    decay : float
        Weight of the old average.
    device : str
        Where the average is kept; empty for where the model is.
    resume : str
        A checkpoint file of timm's training script, whose ``state_dict_ema`` is loaded; empty for
        none.

    Attributes
    ----------
    ema : torch.nn.Module
        The averaged copy; also as ``module``.
    decay : float
        May be changed between steps.
    device : str
    ema_has_module : bool
        Whether the copy is of a data parallel wrapper.

    Raises
    ------
    CheckpointError
        If ``resume`` holds no dict.

    Notes
    -----
    Where it differs from timm's (1.0.31):

    - integer buffers, such as ``num_batches_tracked``, are copied exactly; timm's averages them and
      truncates, so that they lag and then stand still;
    - tied weights are averaged once; timm's once for each of their names;
    - 16-bit averages are rounded at random, and so move; timm's stand still once an update is below
      half their last place;
    - a model with fewer or more tensors, or others, is refused before anything is written.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        device: Any = "",
        resume: str | PathLike[str] = "",
    ) -> None:
        self.ema = duplicate(model).eval()
        self.decay = decay
        self.device = device
        if device:
            self.ema.to(device=device)
        self.ema_has_module = hasattr(self.ema, "module")
        self._following = _Following()
        if resume:
            self._load_checkpoint(resume)
        for parameter in self.ema.parameters():
            parameter.requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The averaged copy: timm's ``unwrap_model`` and ``CheckpointSaver`` look for it here."""
        return self.ema

    def _load_checkpoint(self, checkpoint_path: str | PathLike[str]) -> None:
        checkpoint = _loaded(checkpoint_path)
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
            state = {
                name if name.startswith("module.") else f"module.{name}": value
                for name, value in state.items()
            }
        self.ema.load_state_dict(state)
        _logger.info("loaded 'state_dict_ema' of %s", checkpoint_path)

    def update(self, model: nn.Module) -> None:
        """Take the weights of a model into the average.

        Parameters
        ----------
        model : torch.nn.Module
            May be wrapped (``torch.compile``, data parallel), and on another device.

        Raises
        ------
        LayoutError, DTypeError, BridgeError
            Naming the tensors; nothing was written then.
        """
        self._following.update(self.ema, model, self.decay)


def _loaded(path: str | PathLike[str]) -> Any:
    # timm's checkpoints hold the arguments of the script beside the weights. Before torch 2.5
    # there is no way to allow for them.
    allowed = getattr(torch.serialization, "safe_globals", None)
    with nullcontext() if allowed is None else allowed([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


class ModelEmaV2(nn.Module):
    """timm's second class: a module around a copy of a model, with the average of its state.

    ``ema = decay * ema + (1 - decay) * x`` for parameters and persistent buffers of floats; others
    are copied. The copy is in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        Is deep-copied.
    decay : float
        Weight of the old average.
    device : torch.device or str, optional
        Where the average is kept; by default where the model is.

    Attributes
    ----------
    module : torch.nn.Module
        The averaged copy.
    decay : float
        May be changed between steps.
    device : torch.device, str or None

    Notes
    -----
    Where it differs from timm's (1.0.31): as :class:`ModelEma`, and

    - tensors are paired by name, without the prefixes of wrappers. timm's pairs them by position,
      and stops at the end of the shorter list.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, device: Any = None) -> None:
        super().__init__()
        self.module = duplicate(model).eval()
        self.decay = decay
        self.device = device
        if device is not None:
            self.module.to(device=device)
        self._following = _Following()

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
            return
        self._following.update(self.module, model, self.decay)

    def set(self, model: nn.Module) -> None:
        """Make the average the weights of a model; raises as :meth:`update`."""
        if self._is_overridden():
            self._update(model, lambda ema, new: new)
            return
        self._following.follower(self.module, model).copy(model)

    def _is_overridden(self) -> bool:
        # timm's own goes through the method, so subclasses have what they do in it.
        return type(self)._update is not ModelEmaV2._update

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged copy."""
        return self.module(*args, **kwargs)


class ModelEmaV3(nn.Module):
    """timm's third class: a module around a copy of a model, with the average of its state.

    ``ema += (1 - d) * (x - ema)`` for parameters and persistent buffers of floats, in one call;
    other persistent buffers are copied. The decay ``d`` is :meth:`get_decay`'s. The copy is in
    evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        Is deep-copied.
    decay : float
        Weight of the old average; with ``use_warmup`` the largest.
    min_decay : float
        The smallest, with ``use_warmup``.
    update_after_step : int
        Until the step after this one the average is a copy of the weights.
    use_warmup : bool
        Let the decay grow with the step.
    warmup_gamma, warmup_power : float
        Of that growth.
    device : torch.device or str, optional
        Where the average is kept; by default where the model is.
    dtype : torch.dtype, optional
        Of the average's floats; by default that of the model.
    stochastic_rounding : bool
        Round 16-bit averages at random, so that they move by what is below their resolution, on
        average; otherwise to nearest.
    stochastic_rounding_seed : int
        Of the random bits, which also depend on the step, the tensor's name, and the element's
        place in the tensor.
    foreach : bool
        Without effect: every update is one call.
    exclude_buffers : bool
        Copy all buffers, also those that are not persistent, instead of averaging them.

    Attributes
    ----------
    module : torch.nn.Module
        The averaged copy.
    decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power, device, dtype, \
stochastic_rounding, stochastic_rounding_seed, foreach, exclude_buffers
        As given; all but ``device`` and ``dtype`` may be changed between steps.

    Notes
    -----
    The state is that of ``module`` alone, as in timm. In a run that is resumed the random bits are
    those of an uninterrupted one if ``update`` is given the step; without it they begin again.

    Where it differs from timm's (1.0.31):

    - tied weights are averaged once. timm's averages them once for each of their names, unless
      ``exclude_buffers=True``: at ``decay=0.9`` they move by 0.19 instead of 0.1;
    - tensors are paired by name, without the prefixes of wrappers, and a model with fewer or more
      tensors, or others, is refused before anything is written. timm's pairs them by position and
      stops at the end of the shorter list;
    - ``stochastic_rounding`` is for float16 as well; timm's float16 averages stand still;
    - where the decay is 0 the average is the weights, also over a NaN.
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
        super().__init__()
        self.module = duplicate(model).eval()
        self.decay = decay
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.use_warmup = use_warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.device = device
        self.dtype = dtype
        self.stochastic_rounding = stochastic_rounding
        self.stochastic_rounding_seed = stochastic_rounding_seed
        self.foreach = foreach
        self.exclude_buffers = exclude_buffers
        if device is not None:
            self.module.to(device=device)
        if dtype is not None:
            self.module.to(dtype=dtype)
        self._following = _Following()

    def get_decay(self, step: int | None = None) -> float:
        """The decay at a step.

        Parameters
        ----------
        step : int, optional
            Of the training, from 0.

        Returns
        -------
        float
            With ``n = step - update_after_step - 1``: 0 where ``n <= 0``; ``decay`` without
            warm-up, or without a step; else ``1 - (1 + n / warmup_gamma) ** -warmup_power``, at
            most ``decay`` and at least ``min_decay``.
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
        """Take the weights of a model into the average.

        Parameters
        ----------
        model : torch.nn.Module
            May be wrapped (``torch.compile``, data parallel), and on another device.
        step : int, optional
            Of the training, from 0: the decay and random bits depend on it.

        Raises
        ------
        LayoutError, DTypeError, BridgeError
            Naming the tensors; nothing was written then.
        """
        decay = self.get_decay(step)
        if step is not None:
            self._following.step = max(0, int(step)) % 2**63
        if self.exclude_buffers:
            self.apply_update_no_buffers_(model, decay)
        else:
            self.apply_update_(model, decay)

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """One update, of parameters and buffers, with a given decay; raises as :meth:`update`."""
        self._following.update(self.module, model, decay, **self._settings(exclude_buffers=False))

    def apply_update_no_buffers_(self, model: nn.Module, decay: float) -> None:
        """One update with a given decay, in which buffers are copied; raises as :meth:`update`."""
        self._following.update(self.module, model, decay, **self._settings(exclude_buffers=True))

    def set(self, model: nn.Module) -> None:
        """Make the average the weights of a model; raises as :meth:`update`."""
        settings = self._settings(exclude_buffers=False)
        self._following.follower(self.module, model, **settings).copy(model)

    def _settings(self, exclude_buffers: bool) -> dict[str, Any]:
        return {
            "exclude_buffers": exclude_buffers,
            "rounding": "stochastic" if self.stochastic_rounding else "nearest",
            # torch's generators take negative seeds as well.
            "seed": int(self.stochastic_rounding_seed) % 2**63,
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged copy."""
        return self.module(*args, **kwargs)
