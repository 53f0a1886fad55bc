"""``ema_pytorch.KarrasEMA`` and ``PostHocEMA``: power-function averages, post-hoc synthesis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastema.bridges.names import plain_names
from fastema.compat.ema_pytorch import snapshots
from fastema.compat.ema_pytorch.model import NO_NAMES, ModelAverage
from fastema.compat.ema_pytorch.schedule import whole_number
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError
from fastema.rules.posthoc import PowerProfile, solve
from fastema.rules.power import Power, gamma_of

__all__ = ["KarrasEMA", "PostHocEMA"]


def _resolve_gamma(gamma: float | None, sigma_rel: float | None) -> float:
    """Return the exponent, given by exactly one of ``gamma`` and ``sigma_rel``."""
    _refuse_both("gamma", gamma, "sigma_rel", sigma_rel)
    return Power(gamma).gamma if gamma is not None else gamma_of(sigma_rel)  # type: ignore[arg-type]


def _refuse_both(name: str, value: Any, other_name: str, other: Any) -> None:
    if (value is None) == (other is None):
        raise ArgumentError(f"{name}={value!r}, {other_name}={other!r}: give one of the two")


class KarrasEMA(ModelAverage):
    """A power-function average of a model, kept in a copy of the model.

    Every ``update_every``-th call of :meth:`update` computes ``avg += (1 - beta) * (x - avg)`` with
    ``beta = (1 - 1 / (step + 1)) ** (gamma + 1)``: with ``update_every=1`` the weight of step ``s``
    is proportional to ``s**gamma`` (T. Karras et al., Analyzing and Improving the Training Dynamics
    of Diffusion Models, 2023, section 3.1, https://arxiv.org/abs/2312.02696). The first call copies
    the weights. As in ema_pytorch, ``update_every=k`` changes the exponent to ``(gamma + 1) / k -
    1``, so that with k = 10 a width of 0.05 becomes 0.246; :class:`fastema.PowerEMA` keeps the
    width.

    Parameters
    ----------
    model : torch.nn.Module
        The model in training, which does not become a submodule.
    sigma_rel, gamma : float, optional
        Either the standard deviation of that profile, relative to the number of steps, in
        (0, 0.2887], or its exponent, >= 0.
    frozen : bool
        Whether updates after the first copy do nothing (default False).
    peer_exact : bool
        Round 16-bit averages to nearest, as ema_pytorch does, to continue an old run.
    update_every : int
        Steps per update (default 100).
    ema_model, and all others
        See :class:`EMA`, also for attributes and errors.
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
        self.gamma = _resolve_gamma(gamma, sigma_rel)
        self.frozen = frozen
        self.update_every = whole_number(update_every, "update_every")
        self.online_model = [model]
        self._set_ema_model(ema_model)
        self._register_counters()

    @property
    def beta(self) -> float:
        """The weight of the old average if an update happened now."""
        return 1.0 - self._weight

    @property
    def _weight(self) -> float:
        return Power(self.gamma).weight(self._num_steps + 1)

    def update_moving_average(self, ma_model: nn.Module, current_model: nn.Module) -> None:
        """Compute ``ma += (1 - beta) * (current - ma)``, unless the average is frozen.

        Raises the same errors as :meth:`update`.
        """
        if not self.frozen:
            self._blend(ma_model, current_model, self._weight)

    def iter_all_ema_params_and_buffers(self) -> Iterator[Tensor]:
        """Return an iterator over the float tensors that are averaged."""
        return iter(self._get_averaged_tensors().values())

    def _get_averaged_tensors(self) -> dict[str, Tensor]:
        named = [*self.get_params_iter(self.ema_model), *self.get_buffers_iter(self.ema_model)]
        copied = self.param_or_buffer_names_no_ema
        return {
            name: tensor
            for name, tensor in named
            if not self._is_ignored(name) and name not in copied
        }

    def _get_profile(self, gamma: float, step: int) -> PowerProfile:
        """Return the profile of an average after ``step`` calls, in a run that began at time 0."""
        last = (step - 1) // self.update_every * self.update_every
        return PowerProfile(last + 2, gamma)


class PostHocEMA(nn.Module):
    """Power-function averages with snapshots on disk, from which other widths are synthesized.

    :class:`fastema.PowerEMA` and :mod:`fastema.posthoc` do the same, with all averages in one pass
    over the weights, safetensors files, and the error of a synthesized average.

    Parameters
    ----------
    model : torch.nn.Module
        The model in training, which does not become a submodule.
    ema_model : torch.nn.Module or callable, optional
        A model to copy for each average, or a function that returns one; by default ``model`` is
        copied.
    sigma_rels, gammas : tuple of float, optional
        Either the widths or the exponents of the averages, at least two, see :class:`KarrasEMA`.
    checkpoint_every_num_steps : int or "manual"
        Steps after which :meth:`update` calls :meth:`checkpoint` (default 1000).
    checkpoint_folder : str or Path
        Folder of the snapshots; created if it does not exist.
    checkpoint_dtype : torch.dtype
        Dtype of floats in snapshots. The default, float16, holds no number above 65,504.
    **kwargs
        Passed to :class:`KarrasEMA`.

    Attributes
    ----------
    ema_models : torch.nn.ModuleList
        The averages, one per exponent in ``gammas``.

    Raises
    ------
    ArgumentError
        For an invalid parameter.

    Notes
    -----
    Snapshots are called ``{average}.{step}.pt``, and either library reads the other's. Synthesis
    keeps coefficients small where they would amplify the rounding of the snapshots.
    docs/drop-in.md lists the differences from ema_pytorch 0.8.3.

    With ``update_every`` above 1 the averages are wider than requested, see :class:`KarrasEMA`.
    Like ema_pytorch, synthesis does not take that into account; :class:`fastema.PowerEMA` and
    :func:`fastema.posthoc.synthesize` do.
    """

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
        _refuse_both("sigma_rels", sigma_rels, "gammas", gammas)
        if gammas is None:
            gammas = tuple(gamma_of(sigma_rel) for sigma_rel in sigma_rels or ())
        if len(gammas) < 2 or len(set(gammas)) != len(gammas):
            raise ArgumentError(
                f"the averages have the exponents {gammas}: expected at least two different ones, "
                "from which others can be synthesized"
            )
        if checkpoint_every_num_steps != "manual":
            try:
                checkpoint_every_num_steps = whole_number(
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
        self.ema_models: Any = nn.ModuleList([self._new_average(gamma) for gamma in gammas])
        self.checkpoint_folder = Path(checkpoint_folder)
        self.checkpoint_folder.mkdir(exist_ok=True, parents=True)

    def _new_average(self, gamma: float) -> KarrasEMA:
        made = self.maybe_ema_model
        if isinstance(made, nn.Module):
            made = partial(deepcopy, made)
        return KarrasEMA(self.model, ema_model=made, gamma=gamma, **self.ema_kwargs)

    @property
    def model(self) -> Any:
        """The model in training, whose weights are averaged."""
        return self._model[0]

    @property
    def step(self) -> Tensor:
        """The number of calls of :meth:`update` so far."""
        step: Tensor = self.ema_models[0].step
        return step

    @property
    def device(self) -> torch.device:
        """The device of the counters."""
        return self.step.device

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the output of each averaged model."""
        return tuple(ema_model(*args, **kwargs) for ema_model in self.ema_models)

    def copy_params_from_model_to_ema(self) -> None:
        """Copy the weights into all averages."""
        for ema_model in self.ema_models:
            ema_model.copy_params_from_model_to_ema()

    def copy_params_from_ema_to_model(self) -> None:
        """Copy each average into the model in training, one after the other: the last remains."""
        for ema_model in self.ema_models:
            ema_model.copy_params_from_ema_to_model()

    def update(self) -> None:
        """Count a step in all averages, and write snapshots if they are due.

        Raises the errors of :meth:`KarrasEMA.update` and :meth:`checkpoint`.
        """
        with defer_signals():
            for ema_model in self.ema_models:
                ema_model.update()
        every = self.checkpoint_every_num_steps
        if every == "manual":
            return
        if self.ema_models[0]._num_steps % whole_number(every, "checkpoint_every_num_steps") == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write a snapshot of every average, each file atomically.

        Raises a CheckpointError if the folder is gone, an OSError if a file cannot be written.
        """
        for index, ema_model in enumerate(self.ema_models):
            snapshots.write_snapshot(
                self.checkpoint_folder, index, ema_model.state_dict(), self.checkpoint_dtype
            )

    def synthesize_ema_model(
        self,
        gamma: float | None = None,
        sigma_rel: float | None = None,
        step: int | Tensor | None = None,
    ) -> KarrasEMA:
        """Synthesize an average of any width at any step from the snapshots.

        Snapshots are read a few MB at a time, and summed in float64.

        Parameters
        ----------
        gamma, sigma_rel : float, optional
            Either the exponent or the width of the average, see :class:`KarrasEMA`.
        step : int or scalar tensor, optional
            Step of the average; the step of the latest snapshot by default. Between two snapshots,
            the step of the earlier one is used.

        Raises
        ------
        ArgumentError
            Unless exactly one of ``gamma`` and ``sigma_rel`` is given, and for a step before the
            first snapshot or after the last.
        CheckpointError
            If there are no snapshots, or they do not match the model.
        """
        gamma = _resolve_gamma(gamma, sigma_rel)
        every = snapshots.find_snapshots(self.checkpoint_folder, self.num_ema_models)
        asked = every[-1].step if step is None else whole_number(step, "step", 0)
        if not every[0].step <= asked <= every[-1].step:
            raise ArgumentError(
                f"step={asked}: the snapshots are of steps {every[0].step} to {every[-1].step}"
            )
        # Coefficients sum to 1, so a profile that ends later would be squeezed into the snapshots.
        last = max(one.step for one in every if one.step <= asked)
        synthesized = self._new_average(gamma)
        # Snapshots between the same two updates are equal. Leave out those after `last`.
        unique = {
            synthesized._get_profile(self.gammas[one.average_index], one.step): one.path
            for one in every
            if one.step <= last
        }
        newest = snapshots.read_snapshot(next(reversed(unique.values())))
        target = synthesized._get_profile(gamma, last)
        found = solve(list(unique), target, noise=_get_noise_penalty(newest))
        used = [(path, c) for path, c in zip(unique.values(), found.coefficients, strict=True) if c]
        self._fill(synthesized, newest, used)
        return synthesized

    def _fill(
        self, target: KarrasEMA, newest: dict[str, Any], used: list[tuple[Path, float]]
    ) -> None:
        """Fill a model with sums of averaged tensors, and other tensors of the newest snapshot."""
        model = target.ema_model
        state = model.state_dict()
        # Names in files may have wrapper prefixes or not, independently of the model's names.
        theirs = dict(zip(plain_names(list(newest)), newest, strict=True))
        plain = dict(zip(state, plain_names(list(state)), strict=True))
        files = {name: theirs.get(plain[name], name) for name in state}
        like = {
            files[name]: one
            for name, one in target._get_averaged_tensors().items()
            if name in state
        }
        summed = snapshots.sum_snapshots([path for path, _ in used], [c for _, c in used], like)
        for name in state:
            # Only the first of tied tensors is summed; the others share its sum.
            first = files.get(target._names.get(plain[name], name), "")
            state[name] = summed.get(first, newest.get(files[name], state[name]))
        model.load_state_dict(state)


def _get_noise_penalty(state: dict[str, Any]) -> float:
    """Return the penalty on coefficients, since large ones amplify a snapshot's rounding."""
    floats = (one for one in state.values() if isinstance(one, Tensor) and one.is_floating_point())
    return 1e-2 if any(one.itemsize == 2 for one in floats) else 1e-4
