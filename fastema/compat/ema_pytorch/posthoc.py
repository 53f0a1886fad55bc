"""``ema_pytorch.KarrasEMA`` and ``PostHocEMA``: power-function averages, and others out of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from fastema.bridges.names import plain_names
from fastema.compat.ema_pytorch import snapshots
from fastema.compat.ema_pytorch.model import NO_NAMES, ModelAverage, whole
from fastema.engine.interrupts import deferred
from fastema.errors import ArgumentError
from fastema.rules.posthoc import PowerProfile, solve
from fastema.rules.power import Power, gamma_of

__all__ = ["KarrasEMA", "PostHocEMA"]

_NOISE: Final = {torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Large coefficients multiply the rounding of the snapshots: how far they are held down."""


def _gamma(gamma: float | None, sigma_rel: float | None) -> float:
    """The exponent, of which one of two descriptions is given."""
    if (gamma is None) == (sigma_rel is None):
        raise ArgumentError(f"gamma={gamma!r}, sigma_rel={sigma_rel!r}: give one of the two")
    if gamma is not None:
        return Power(gamma).gamma
    assert sigma_rel is not None
    return gamma_of(sigma_rel)


class KarrasEMA(ModelAverage):
    """A power-function average of a model, in a copy of it.

    At every ``update_every``-th call ``avg += (1 - beta) * (x - avg)`` with
    ``beta = (1 - update_every / (step + 1)) ** (gamma + 1)``: step ``s`` of ``n`` weighs as
    ``s**gamma``. The first call copies the weights.

    Parameters
    ----------
    model : torch.nn.Module
        The model to follow; no submodule of this one.
    sigma_rel : float, optional
        Standard deviation of that profile as a share of the steps so far, in (0, 0.2887].
    gamma : float, optional
        Its exponent, at least 0, in place of ``sigma_rel``.
    ema_model : torch.nn.Module or callable, optional
        What holds the average; see :class:`EMA`.
    update_every : int
    frozen : bool
        Whether updates after the first copy do nothing.
    param_or_buffer_names_no_ema, ignore_names, ignore_startswith_names
        See :class:`EMA`.
    allow_different_devices, move_ema_to_online_device : bool
        See :class:`EMA`.
    peer_exact : bool
        The numbers of ema_pytorch, to go on with an old run: every update counts for one step, see
        below; and 16-bit averages are rounded to nearest.

    Attributes
    ----------
    ema_model : torch.nn.Module
        The averaged model.
    initted, step : torch.Tensor
        Whether the average has begun, and calls of :meth:`update` so far.

    Raises
    ------
    ArgumentError
        For a parameter without a valid value.
    BridgeError
        If the model cannot be copied.

    Notes
    -----
    Where it differs from ema_pytorch 0.8.3, on purpose:

    - With ``update_every = k`` the k steps between two updates enter ``beta``, so that the width is
      the one asked for. Theirs lets an update count for one step: for ``sigma_rel = 0.05`` the
      width is 0.246 with ``k = 10`` and 0.241 with its default ``k = 100``, where most of the
      weight is on the beginning of the run. With ``update_every = 1`` both are the same. What
      ``fastema.compat.install("ema_pytorch")`` puts in the place of theirs keeps their weights.
    - Integers, 16-bit averages, mixed dtypes, devices, models that do not match, failed updates and
      models that cannot be copied: as in :class:`EMA`.
    - ``gamma < 0``, which is the width of another profile too, and ``sigma_rel`` above 0.2887,
      which is that of none, are errors.

    References
    ----------
    P. Wang, ema_pytorch 0.8.3, 2025, https://github.com/lucidrains/ema-pytorch

    T. Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2023,
    section 3.1, https://arxiv.org/abs/2312.02696
    """

    def __init__(
        self,
        model: nn.Module,
        sigma_rel: float | None = None,
        gamma: float | None = None,
        ema_model: nn.Module | Callable[[], nn.Module] | None = None,
        update_every: int = 100,
        frozen: bool = False,
        param_or_buffer_names_no_ema: set[str] | list[str] = NO_NAMES,
        ignore_names: Collection[str] = NO_NAMES,
        ignore_startswith_names: Collection[str] = NO_NAMES,
        allow_different_devices: bool = False,
        move_ema_to_online_device: bool = False,
        *,
        peer_exact: bool = False,
    ) -> None:
        super().__init__(
            param_or_buffer_names_no_ema=param_or_buffer_names_no_ema,
            ignore_names=ignore_names,
            ignore_startswith_names=ignore_startswith_names,
            allow_different_devices=allow_different_devices,
            move_ema_to_online_device=move_ema_to_online_device,
            peer_exact=peer_exact,
        )
        self.gamma = _gamma(gamma, sigma_rel)
        self.frozen = frozen
        self.update_every = whole(update_every, "update_every")
        self.online_model = [model]
        self._take(ema_model)
        self._register_counters()

    @property
    def model(self) -> Any:
        """The model that is followed."""
        return self.online_model[0]

    @property
    def beta(self) -> float:
        """The weight of the old average in an update that were made now."""
        return 1.0 - self._weight

    @property
    def _weight(self) -> float:
        steps = self._steps_of(self.update_every)
        return Power(self.gamma).weight(self._num_steps + 1, steps)

    def update(self) -> None:
        """Count a step, and take the weights into the average if it is due.

        Raises
        ------
        LayoutError, DTypeError, BridgeError
            Naming the tensors, if the two models do not match; nothing was written or counted.
        """
        with self._next_step() as step:
            if step % whole(self.update_every, "update_every"):
                return
            if self._has_begun:
                self.update_moving_average(self.ema_model, self.model)
            else:
                self.copy_params_from_model_to_ema()
                self._begin()

    def update_moving_average(self, ma_model: nn.Module, current_model: nn.Module) -> None:
        """``ma += (1 - beta) * (current - ma)``, unless the average is frozen.

        Raises
        ------
        LayoutError, DTypeError, BridgeError
            Naming the tensors; nothing was written then.
        """
        if not self.frozen:
            self._blend(ma_model, current_model, self._weight)

    def iter_all_ema_params_and_buffers(self) -> Iterator[Tensor]:
        """The float tensors that are averaged."""
        for name in self._averaged_names():
            yield _tensor(self.ema_model, name)

    def _averaged_names(self) -> list[str]:
        named = [*self.get_params_iter(self.ema_model), *self.get_buffers_iter(self.ema_model)]
        copied = self.param_or_buffer_names_no_ema
        return [name for name, _ in named if not self._ignored(name) and name not in copied]

    def _time(self, step: int) -> int:
        """The end of the average's profile after so many calls: the run began at time 0."""
        last = (step - 1) // self.update_every * self.update_every
        return last + 2

    def _profile(self, gamma: float, step: int) -> PowerProfile:
        """What an average of an exponent weighs after so many calls."""
        return PowerProfile(self._time(step), gamma)


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), last)
    return found


class PostHocEMA(nn.Module):
    """Power-function averages with snapshots on disk, and any other average put together of them.

    Parameters
    ----------
    model : torch.nn.Module
        The model to follow; no submodule of this one.
    ema_model : callable, optional
        Makes a model that holds an average; deep copies by default.
    sigma_rels : tuple of float, optional
        Widths of the averages, at least two, see :class:`KarrasEMA`.
    gammas : tuple of float, optional
        Their exponents, in place of ``sigma_rels``.
    checkpoint_every_num_steps : int or "manual"
        When :meth:`update` calls :meth:`checkpoint`.
    checkpoint_folder : str or Path
        Made if it does not exist.
    checkpoint_dtype : torch.dtype
        Of the floats in snapshots; float16 holds no number above 65,504.
    **kwargs
        Of :class:`KarrasEMA`.

    Attributes
    ----------
    ema_models : torch.nn.ModuleList
        The averages.
    gammas : tuple of float

    Raises
    ------
    ArgumentError
        For a parameter without a valid value.

    See Also
    --------
    fastema.PowerEMA, fastema.posthoc : the same with all averages in one pass over the weights,
        safetensors files, and the error of what is put together.

    Notes
    -----
    Snapshots are called ``{average}.{step}.pt``, and either library reads the other's. Where this
    class differs from that of ema_pytorch 0.8.3, on purpose:

    - ``update_every`` above 1 gives the width asked for, see :class:`KarrasEMA`.
    - A synthesis leaves out snapshots that are newer than the step asked for, of which theirs uses
      all; its coefficients sum to 1, which those of theirs do not; and they are held down where
      they would multiply the rounding of the snapshots.
    - The time of a snapshot is that of the latest update before it, not that of the call.
    - Only floats of a snapshot are cast; theirs casts ``step`` and ``num_batches_tracked`` to
      float16 too, in which numbers above 2,048 are not exact.
    - What is copied or ignored comes from the latest snapshot that is used; in theirs from the
      model as it is now. Files with other names in the folder are no snapshots; theirs fails.
    - A module as ``ema_model`` is copied for every average; in theirs all of them share it.
    - With ``peer_exact=True`` and ``update_every = k`` above 1, an average has the exponent
      ``(gamma + 1) / k - 1`` in place of the one asked for, and a synthesis reckons with that: for
      old runs, and files that ema_pytorch wrote with that ``k``. Below 0 there is no synthesis.

    References
    ----------
    P. Wang, ema_pytorch 0.8.3, 2025, https://github.com/lucidrains/ema-pytorch

    T. Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2023,
    section 3.2, https://arxiv.org/abs/2312.02696
    """

    _average_class: ClassVar[type[KarrasEMA]] = KarrasEMA

    def __init__(
        self,
        model: nn.Module,
        ema_model: Callable[[], nn.Module] | nn.Module | None = None,
        sigma_rels: tuple[float, ...] | None = None,
        gammas: tuple[float, ...] | None = None,
        checkpoint_every_num_steps: int | str = 1000,
        checkpoint_folder: str | Path = "./post-hoc-ema-checkpoints",
        checkpoint_dtype: torch.dtype = torch.float16,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if (sigma_rels is None) == (gammas is None):
            raise ArgumentError(
                f"sigma_rels={sigma_rels!r}, gammas={gammas!r}: give one of the two"
            )
        if gammas is None:
            gammas = tuple(gamma_of(sigma_rel) for sigma_rel in sigma_rels or ())
        if len(gammas) < 2 or len(set(gammas)) != len(gammas):
            raise ArgumentError(
                f"the averages have the exponents {gammas}: expected at least two different ones, "
                "of which others can be put together"
            )
        if checkpoint_every_num_steps != "manual":
            try:
                checkpoint_every_num_steps = whole(
                    checkpoint_every_num_steps, "checkpoint_every_num_steps"
                )
            except ArgumentError as error:
                raise ArgumentError(f"{error}, or 'manual'") from None
        self.maybe_ema_model = ema_model
        self.gammas = gammas
        self.num_ema_models = len(gammas)
        self._model = [model]
        self.checkpoint_every_num_steps = checkpoint_every_num_steps
        self.checkpoint_dtype = checkpoint_dtype
        self.ema_kwargs = kwargs
        self.ema_models = nn.ModuleList([self._made(gamma) for gamma in gammas])
        self.checkpoint_folder = Path(checkpoint_folder)
        self.checkpoint_folder.mkdir(exist_ok=True, parents=True)

    def _made(self, gamma: float) -> KarrasEMA:
        made = self.maybe_ema_model
        if isinstance(made, nn.Module):
            made = partial(deepcopy, made)
        return self._average_class(self.model, ema_model=made, gamma=gamma, **self.ema_kwargs)

    @property
    def model(self) -> Any:
        """The model that is followed."""
        return self._model[0]

    @property
    def _first(self) -> KarrasEMA:
        first = self.ema_models[0]
        assert isinstance(first, KarrasEMA)
        return first

    @property
    def step(self) -> Tensor:
        """Calls of :meth:`update` so far."""
        return self._first.step

    @property
    def device(self) -> torch.device:
        """That of the counters."""
        return self.step.device

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What each averaged model returns."""
        return tuple(ema_model(*args, **kwargs) for ema_model in self.ema_models)

    def copy_params_from_model_to_ema(self) -> None:
        """Make all averages the weights."""
        for ema_model in self._averages():
            ema_model.copy_params_from_model_to_ema()

    def copy_params_from_ema_to_model(self) -> None:
        """Make the weights each of the averages in turn: the last one stays."""
        for ema_model in self._averages():
            ema_model.copy_params_from_ema_to_model()

    def _averages(self) -> Iterator[KarrasEMA]:
        for ema_model in self.ema_models:
            assert isinstance(ema_model, KarrasEMA)
            yield ema_model

    def update(self) -> None:
        """Count a step in all averages, and write snapshots if they are due.

        Raises
        ------
        LayoutError, DTypeError, BridgeError
            Naming the tensors, if a model does not match; nothing was written or counted for it.
        OSError
            If snapshots cannot be written.
        """
        with deferred():
            for ema_model in self._averages():
                ema_model.update()
        every = self.checkpoint_every_num_steps
        if every != "manual" and not self._first._num_steps % whole(
            every, "checkpoint_every_num_steps"
        ):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write a snapshot of every average, to ``{average}.{step}.pt``.

        Raises
        ------
        CheckpointError
            If the folder is gone.
        OSError
            If it cannot be written; files of that name are as they were then.
        """
        for which, ema_model in enumerate(self.ema_models):
            snapshots.write(
                self.checkpoint_folder, which, ema_model.state_dict(), self.checkpoint_dtype
            )

    def synthesize_ema_model(
        self,
        gamma: float | None = None,
        sigma_rel: float | None = None,
        step: int | Tensor | None = None,
    ) -> KarrasEMA:
        """Put an average of any width together, as it would have been at any step.

        Snapshots are read a few MB at a time, and summed in float64.

        Parameters
        ----------
        gamma : float, optional
            Exponent of the profile wanted, at least 0.
        sigma_rel : float, optional
            Its width, in (0, 0.2887], in place of ``gamma``.
        step : int, optional
            By default that of the latest snapshot. Between two snapshots it is as if the step of
            the earlier one were asked for: nothing knows of what came after it.

        Returns
        -------
        KarrasEMA
            Whose ``ema_model`` is the average.

        Raises
        ------
        ArgumentError
            If not one of the two is given, or the step is no whole number, before the first
            snapshot or after the last.
        CheckpointError
            If there are no snapshots, or they do not fit the model.
        """
        gamma = _gamma(gamma, sigma_rel)
        every = snapshots.found(self.checkpoint_folder, self.num_ema_models)
        asked = every[-1].step if step is None else whole(step, "step", 0)
        if not every[0].step <= asked <= every[-1].step:
            raise ArgumentError(
                f"step={asked}: the snapshots are of steps {every[0].step} to {every[-1].step}"
            )
        # Coefficients sum to 1: a profile that ends later would be squeezed into the snapshots.
        last = max(one.step for one in every if one.step <= asked)
        synthesized = self._made(gamma)
        exponents = [self._exponent(one) for one in self.gammas]
        # Two snapshots between the same two updates are the same; those after `last` stay out.
        unique = {
            synthesized._profile(exponents[one.which], one.step): one.path
            for one in every
            if one.step <= last
        }
        newest = snapshots.read(next(reversed(unique.values())))
        found = solve(
            list(unique),
            synthesized._profile(gamma, last),
            noise=_NOISE.get(_dtype_of(newest), 1e-4),
        )
        used = [(path, c) for path, c in zip(unique.values(), found.coefficients, strict=True) if c]
        self._fill(synthesized, newest, used)
        return synthesized

    def _exponent(self, gamma: float) -> float:
        """Of the profile that an average has: not the one asked for, with the peer's numbers."""
        first = self._first
        if not first.peer_exact:
            return gamma
        exponent = (gamma + 1) / first.update_every - 1
        if exponent < 0:
            raise ArgumentError(
                f"with peer_exact=True and update_every={first.update_every} the average of "
                f"gamma={gamma:g} has the exponent {exponent:.3g}: of weights that fall from the "
                "beginning of a run on, nothing can be put together"
            )
        return exponent

    def _fill(
        self, target: KarrasEMA, newest: dict[str, Any], used: list[tuple[Path, float]]
    ) -> None:
        """Sum the averaged tensors, and take the others from the newest snapshot."""
        model = target.ema_model
        state = model.state_dict()
        # In the files the names may be with wrappers or without, whatever the model has now.
        theirs = dict(zip(plain_names(list(newest)), newest, strict=True))
        plain = dict(zip(state, plain_names(list(state)), strict=True))
        files = {name: theirs.get(plain[name], name) for name in state}
        averaged = [name for name in target._averaged_names() if name in state]
        paths, coefficients = [path for path, _ in used], [c for _, c in used]
        like = {files[name]: _tensor(model, name) for name in averaged}
        summed = snapshots.mixed(paths, coefficients, like)
        for name in state:
            # Of tied tensors the first is summed, and the others are it.
            first = files.get(target._names.get(plain[name], name), "")
            state[name] = summed.get(first, newest.get(files[name], state[name]))
        model.load_state_dict(state)


def _dtype_of(state: dict[str, Any]) -> torch.dtype:
    """The float dtype of a snapshot."""
    floats = {
        value.dtype
        for value in state.values()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return max(floats, key=lambda dtype: _NOISE.get(dtype, 0.0), default=torch.float32)
