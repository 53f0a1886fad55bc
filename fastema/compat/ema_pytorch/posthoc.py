"""``ema_pytorch.KarrasEMA`` and ``PostHocEMA``: power-function averages, and others out of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

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


def _gamma(gamma: float | None, sigma_rel: float | None) -> float:
    """The exponent, by one of two descriptions."""
    _refuse_both("gamma", gamma, "sigma_rel", sigma_rel)
    return Power(gamma).gamma if gamma is not None else gamma_of(sigma_rel)  # type: ignore[arg-type]


def _refuse_both(name: str, value: Any, other_name: str, other: Any) -> None:
    if (value is None) == (other is None):
        raise ArgumentError(f"{name}={value!r}, {other_name}={other!r}: give one of the two")


class KarrasEMA(ModelAverage):
    """A power-function average of a model, in a copy of it.

    At every ``update_every``-th call ``avg += (1 - beta) * (x - avg)`` with ``beta = (1 -
    update_every / (step + 1)) ** (gamma + 1)``: step ``s`` of ``n`` weighs as ``s**gamma`` (T.
    Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2023, section
    3.1, https://arxiv.org/abs/2312.02696). The first call copies the weights.

    Parameters
    ----------
    model : torch.nn.Module
        The model to follow; no submodule of this one.
    sigma_rel, gamma : float, optional
        Standard deviation of that profile as a share of the steps so far, in (0, 0.2887], or its
        exponent, at least 0: one of the two.
    frozen : bool
        Whether updates after the first copy do nothing.
    peer_exact : bool
        The numbers of ema_pytorch, to continue with an old run: every update counts for one step,
        which with ``update_every=10`` makes a width of 0.05 one of 0.246; and 16-bit averages are
        rounded to nearest.
    ema_model, update_every, and all others
        See :class:`EMA`, as for attributes and errors.
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
        self.update_every = whole_number(update_every, "update_every")
        self.online_model = [model]
        self._take(ema_model)
        self._register_counters()

    @property
    def beta(self) -> float:
        """The weight of the old average in an update that were made now."""
        return 1.0 - self._weight

    @property
    def _weight(self) -> float:
        return Power(self.gamma).weight(self._num_steps + 1, self._steps_per_update)

    def update_moving_average(self, ma_model: nn.Module, current_model: nn.Module) -> None:
        """``ma += (1 - beta) * (current - ma)``, unless it is frozen; raises as :meth:`update`."""
        if not self.frozen:
            self._blend(ma_model, current_model, self._weight)

    def iter_all_ema_params_and_buffers(self) -> Iterator[Tensor]:
        """The float tensors that are averaged."""
        return iter(self._averaged().values())

    def _averaged(self) -> dict[str, Tensor]:
        named = [*self.get_params_iter(self.ema_model), *self.get_buffers_iter(self.ema_model)]
        copied = self.param_or_buffer_names_no_ema
        return {
            name: tensor for name, tensor in named if not self._ignored(name) and name not in copied
        }

    def _profile(self, gamma: float, step: int) -> PowerProfile:
        """Return the profile of an exponent after so many calls: the run began at time 0."""
        last = (step - 1) // self.update_every * self.update_every
        return PowerProfile(last + 2, gamma)


class PostHocEMA(nn.Module):
    """Power-function averages with snapshots on disk, and any other average synthesized from them.

    :class:`fastema.PowerEMA` and :mod:`fastema.posthoc` do the same with all averages in one pass
    over the weights, safetensors files, and the error of what is synthesized.

    Parameters
    ----------
    model : torch.nn.Module
        The model to follow; no submodule of this one.
    ema_model : torch.nn.Module or callable, optional
        What is copied, or makes a model, for each average; by default ``model`` is copied.
    sigma_rels, gammas : tuple of float, optional
        Widths or exponents of the averages, at least two, see :class:`KarrasEMA`.
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
        The averages, of the exponents ``gammas``.

    Raises
    ------
    ArgumentError
        For a parameter without a valid value.

    Notes
    -----
    Snapshots are called ``{average}.{step}.pt``, and either library reads the other's. Coefficients
    are held down where they would multiply the rounding of the snapshots. docs/drop-in.md says
    where it differs from ema_pytorch 0.8.3.

    With ``peer_exact=True`` and ``update_every = k`` above 1, an average has the exponent
    ``(gamma + 1) / k - 1`` in place of the one asked for, and a synthesis reckons with that: for
    old runs, and files that ema_pytorch wrote with that ``k``. Below 0 there is no synthesis.
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
        return self._average_class(self.model, ema_model=made, gamma=gamma, **self.ema_kwargs)

    @property
    def model(self) -> Any:
        """The model that is followed."""
        return self._model[0]

    @property
    def step(self) -> Tensor:
        """Calls of :meth:`update` so far."""
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
        """Make all averages the weights."""
        for ema_model in self.ema_models:
            ema_model.copy_params_from_model_to_ema()

    def copy_params_from_ema_to_model(self) -> None:
        """Make the weights each of the averages in turn: the last one stays."""
        for ema_model in self.ema_models:
            ema_model.copy_params_from_ema_to_model()

    def update(self) -> None:
        """Count a step in all averages, and write snapshots if they are due."""
        with defer_signals():
            for ema_model in self.ema_models:
                ema_model.update()
        every = self.checkpoint_every_num_steps
        if every == "manual":
            return
        if self.ema_models[0]._num_steps % whole_number(every, "checkpoint_every_num_steps") == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write a snapshot of every average, whole or not at all.

        A CheckpointError if the folder is gone, an OSError if a file cannot be written.
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
        """Put an average of any width, by ``gamma`` or ``sigma_rel``, together for any step.

        By default that of the latest snapshot. Between two snapshots it is as if the step of the
        earlier one were asked for. Snapshots are read a few MB at a time, and summed in float64.

        Raises
        ------
        ArgumentError
            For not one of the two, or a step before the first snapshot or after the last.
        CheckpointError
            If there are no snapshots, or they do not fit the model.
        """
        gamma = _gamma(gamma, sigma_rel)
        every = snapshots.find(self.checkpoint_folder, self.num_ema_models)
        asked = every[-1].step if step is None else whole_number(step, "step", 0)
        if not every[0].step <= asked <= every[-1].step:
            raise ArgumentError(
                f"step={asked}: the snapshots are of steps {every[0].step} to {every[-1].step}"
            )
        # Coefficients sum to 1: a profile that ends later would be squeezed into the snapshots.
        last = max(one.step for one in every if one.step <= asked)
        synthesized = self._new_average(gamma)
        exponents = [self._exponent(one) for one in self.gammas]
        # Two snapshots between the same two updates are the same; those after `last` stay out.
        unique = {
            synthesized._profile(exponents[one.which], one.step): one.path
            for one in every
            if one.step <= last
        }
        newest = snapshots.read(next(reversed(unique.values())))
        target = synthesized._profile(gamma, last)
        found = solve(list(unique), target, noise=_noise(newest))
        used = [(path, c) for path, c in zip(unique.values(), found.coefficients, strict=True) if c]
        self._fill(synthesized, newest, used)
        return synthesized

    def _exponent(self, gamma: float) -> float:
        """Return the exponent of an average's profile: with the peer's numbers a different one."""
        first = self.ema_models[0]
        if not first.peer_exact:
            return gamma
        exponent: float = (gamma + 1) / first.update_every - 1
        if exponent < 0:
            raise ArgumentError(
                f"with peer_exact=True and update_every={first.update_every} the average of "
                f"gamma={gamma:g} has the exponent {exponent:.3g}: of weights that fall from the "
                "beginning of a run on, nothing can be synthesized"
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
        like = {files[name]: one for name, one in target._averaged().items() if name in state}
        summed = snapshots.weighted([path for path, _ in used], [c for _, c in used], like)
        for name in state:
            # Of tied tensors the first is summed, and the others are it.
            first = files.get(target._names.get(plain[name], name), "")
            state[name] = summed.get(first, newest.get(files[name], state[name]))
        model.load_state_dict(state)


def _noise(state: dict[str, Any]) -> float:
    """Return the penalty on coefficients: large ones multiply the rounding of a snapshot."""
    floats = (one for one in state.values() if isinstance(one, Tensor) and one.is_floating_point())
    return 1e-2 if any(one.itemsize == 2 for one in floats) else 1e-4
