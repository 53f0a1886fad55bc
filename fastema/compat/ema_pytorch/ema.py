"""``ema_pytorch.EMA``: an average in a copy of the model, with a decay that grows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastema.compat.ema_pytorch.model import NO_NAMES, ModelAverage
from fastema.compat.ema_pytorch.schedule import ScheduledDecayModule, check_finite, whole_number
from fastema.compat.ema_pytorch.tree import EMAPytree
from fastema.errors import ArgumentError

__all__ = ["EMA"]


class EMA(ScheduledDecayModule, ModelAverage):
    """An exponential moving average of a model, kept in a copy of the model.

    From step ``update_after_step`` on, every ``update_every``-th call of :meth:`update` computes
    ``avg += (1 - decay) * (x - avg)`` for all float parameters and buffers, with
    ``decay = clamp(1 - (1 + epoch / inv_gamma) ** -power, min_value, beta)`` and ``epoch`` the
    steps since ``update_after_step``. Before that step, those calls copy the weights.

    Parameters
    ----------
    model : torch.nn.Module
        The model in training. For tensors, or nested lists, tuples and dicts of tensors, the
        result is an :class:`EMAPytree`.
    ema_model : torch.nn.Module or callable, optional
        The model that holds the average, or a function that returns it; a deep copy of ``model``
        by default. It keeps its own dtypes and device.
    beta : float or None
        Largest decay per step (default 0.9999). 1 freezes the average; None means no bound.
    update_after_step, update_every : int
        Steps before averaging begins (default 100), and steps per update (default 10).
    inv_gamma, power, min_value : float
        Shape and lower bound of the decay (default 1, 2/3 and 0). ``inv_gamma = power = 1`` gives
        the running mean if ``update_every`` is 1.
    param_or_buffer_names_no_ema : set or list of str
        Names of tensors that updates copy instead of averaging them.
    ignore_names, ignore_startswith_names : collection of str
        Names, and prefixes of names, of tensors that updates leave unchanged.
    include_online_model : bool
        Whether ``model`` is a submodule, and therefore in ``state_dict()`` (default True).
    allow_different_devices, use_foreach, coerce_dtype : bool
        Accepted and ignored: devices and dtypes may always differ.
    update_model_with_ema_every, update_model_with_ema_beta : int or None, float
        Steps between calls of :meth:`update_model_with_ema` (default None: never), and the share
        of its own weights that the model keeps (default 0).
    forward_method_names : tuple of str
        Methods of the averaged model that this object exposes too.
    move_ema_to_online_device : bool
        Move the averaged model to the device of ``model`` before each update (default False).
    lazy_init_ema : bool
        Create the averaged model at the first update (default False).
    peer_exact : bool
        Reproduce the numbers of ema_pytorch to the digit, to continue an old run: decays in single
        precision, and 16-bit averages rounded to nearest.

    Attributes
    ----------
    ema_model, model : torch.nn.Module
        The averaged model, and the model in training.
    initted, step : torch.Tensor
        Whether the average has begun, and the number of calls of :meth:`update`.

    Raises
    ------
    ArgumentError
        For an invalid parameter. Attributes that were changed are checked at the next step.
    BridgeError
        If the model cannot be copied.

    Notes
    -----
    docs/drop-in.md lists the differences from ema_pytorch 0.8.3. Writes to a counter on a GPU
    through ``.data`` are not noticed.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> ema = EMA(model, beta=0.9, update_after_step=0, update_every=1, power=1.0)
    >>> for value in (1.0, 2.0, 6.0):
    ...     _ = torch.nn.init.constant_(model.weight, value)
    ...     ema.update()
    >>> ema.ema_model.weight.mean().item()          # the mean of 1 (copied), 2 and 6
    3.0
    """

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return an EMA of a module, or an EMAPytree of anything else.

        Copying and unpickling call this without a model, and get an EMA.
        """
        if model is None or isinstance(model, nn.Module):
            return super().__new__(cls)
        return EMAPytree(model, *args, **kwargs)

    def __init__(
        self,
        model: nn.Module,
        ema_model: nn.Module | Callable[[], nn.Module] | None = None,
        beta: float | None = 0.9999,
        update_after_step: int = 100,
        update_every: int = 10,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
        param_or_buffer_names_no_ema: set[str] | list[str] = NO_NAMES,
        ignore_names: Collection[str] = NO_NAMES,
        ignore_startswith_names: Collection[str] = NO_NAMES,
        include_online_model: bool = True,
        allow_different_devices: bool = False,
        use_foreach: bool = False,
        update_model_with_ema_every: int | None = None,
        update_model_with_ema_beta: float = 0.0,
        forward_method_names: tuple[str, ...] = (),
        move_ema_to_online_device: bool = False,
        coerce_dtype: bool = False,
        lazy_init_ema: bool = False,
        *,
        peer_exact: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model={model!r}: expected a module or tensors")
        if lazy_init_ema and ema_model is not None:
            raise ArgumentError("lazy_init_ema=True creates ema_model itself: do not pass both")
        super().__init__(
            param_or_buffer_names_no_ema=param_or_buffer_names_no_ema,
            ignore_names=ignore_names,
            ignore_startswith_names=ignore_startswith_names,
            allow_different_devices=allow_different_devices,
            move_ema_to_online_device=move_ema_to_online_device,
            peer_exact=peer_exact,
        )
        self._set_schedule(beta, update_after_step, update_every, inv_gamma, power, min_value)
        check_finite(update_model_with_ema_beta, "update_model_with_ema_beta")
        if update_model_with_ema_every is not None:
            update_model_with_ema_every = whole_number(
                update_model_with_ema_every, "update_model_with_ema_every"
            )
        self.update_model_with_ema_every = update_model_with_ema_every
        self.update_model_with_ema_beta = update_model_with_ema_beta
        self.use_foreach = use_foreach
        self.coerce_dtype = coerce_dtype
        self.forward_method_names = forward_method_names
        self.include_online_model = include_online_model
        self.online_model = model if include_online_model else [model]
        self.ema_model = None
        if not lazy_init_ema:
            self.init_ema(ema_model)
        self._register_counters()

    def init_ema(self, ema_model: nn.Module | Callable[[], nn.Module] | None = None) -> None:
        """Set the averaged model; called by the constructor or, if lazy, by the first update."""
        self._set_ema_model(ema_model)
        for name in self.forward_method_names:
            setattr(self, name, getattr(self.ema_model, name))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        inside = f"{prefix}ema_model."
        if self.ema_model is None and any(name.startswith(inside) for name in state_dict):
            self.init_ema()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def add_to_optimizer_post_step_hook(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call :meth:`update` after every optimizer step, until ``remove()`` of the handle."""
        return optimizer.register_step_post_hook(lambda *_: self.update())

    @torch.no_grad()
    def forward_eval(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged model in evaluation mode without gradients, then restore its modes."""
        modes = [(module, module.training) for module in self._averaged_model.modules()]
        try:
            return self._averaged_model.eval()(*args, **kwargs)
        finally:
            for module, mode in modes:
                module.training = mode

    # -- training ---------------------------------------------------------------------------------

    def _copy_weights(self) -> None:
        if self.ema_model is None:
            self.init_ema()
        super()._copy_weights()

    def _update_if_due(self, step: int) -> None:
        every = self.update_model_with_ema_every
        gives = every is not None and step % whole_number(every, "update_model_with_ema_every") == 0
        if gives and self._is_due(step):
            self._check_model_update()
        super()._update_if_due(step)
        if gives:
            self.update_model_with_ema()

    def _check_model_update(self) -> None:
        """Raise the errors of writing the average into the model, before the average changes."""
        kept = self.update_model_with_ema_beta
        check_finite(kept, "update_model_with_ema_beta")
        if kept == 0.0 or not self.is_frozen:
            averager = self._get_averager(self.model, self._averaged_model, everything=kept == 0.0)
            averager.check(self._averaged_model)

    def update_moving_average(
        self, ma_model: nn.Module, current_model: nn.Module, current_decay: float | None = None
    ) -> None:
        """Compute ``ma += (1 - decay) * (current - ma)`` of two models, unless frozen.

        ``current_decay`` defaults to the schedule's decay. Raises the
        same errors as :meth:`update`.
        """
        if not self.is_frozen:
            self._blend(ma_model, current_model, self._weight(current_decay))

    def update_model_with_ema(self, decay: float | None = None) -> None:
        """Move the model's weights towards the average: ``x += (1 - decay) * (avg - x)``.

        ``decay`` defaults to ``update_model_with_ema_beta``. At 0, all float tensors are set to the
        average, ignored names included; integers and booleans are unchanged. Raises the same errors
        as :meth:`update`.
        """
        kept = self.update_model_with_ema_beta if decay is None else decay
        if kept == 0.0:
            self.copy_params_from_ema_to_model()
        else:
            self.update_moving_average(self.model, self._averaged_model, kept)
