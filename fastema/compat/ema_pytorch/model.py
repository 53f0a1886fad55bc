"""The base class of averaged models: which tensors are averaged, copied or left unchanged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from fastema.bridges.names import plain_names
from fastema.bridges.torch_parts import refuse_zero3_model
from fastema.compat.averager import ModelAverager
from fastema.compat.ema_pytorch.schedule import StepCountingModule
from fastema.errors import ArgumentError, BridgeError, StateError
from fastema.layout.spec import Role

__all__ = ["NO_NAMES", "ModelAverage"]

Action = Literal["average", "copy", "skip"]

NO_NAMES: set[str] = set()
"""Default for parameters that are sets of names; each average replaces it with a new set."""


class ModelAverage(StepCountingModule):
    """An averaged copy of a model in training; see :class:`EMA` for the parameters."""

    online_model: Any
    ema_model: Any
    update_moving_average: Callable[..., None]

    def __init__(
        self,
        *,
        param_or_buffer_names_no_ema: Collection[str],
        ignore_names: Collection[str],
        ignore_startswith_names: Collection[str],
        allow_different_devices: bool,
        move_ema_to_online_device: bool,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        ignored = {"ignore_names": ignore_names, "ignore_startswith_names": ignore_startswith_names}
        for name, given in ignored.items():
            if isinstance(given, str):
                raise ArgumentError(f"{name}={given!r}: expected a set of names, {{{given!r}}}")
        if not isinstance(param_or_buffer_names_no_ema, set | frozenset | list):
            raise ArgumentError(
                f"param_or_buffer_names_no_ema={param_or_buffer_names_no_ema!r}: expected a set or "
                "a list of names"
            )
        # Each average needs its own sets, since users add names to them.
        self.param_or_buffer_names_no_ema = param_or_buffer_names_no_ema or set()
        self.ignore_names = ignore_names or set()
        self.ignore_startswith_names = ignore_startswith_names or set()
        self.allow_different_devices = allow_different_devices
        self.move_ema_to_online_device = move_ema_to_online_device
        self._names: dict[str, str] = {}
        self._averagers: dict[tuple[bool, bool], tuple[nn.Module, Any, ModelAverager]] = {}

    # -- the two models ---------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The model in training, whose weights are averaged."""
        kept = self.online_model  # a list keeps it from being registered as a submodule
        return kept[0] if isinstance(kept, list) else kept

    def _set_ema_model(self, ema_model: nn.Module | Callable[[], nn.Module] | None) -> None:
        """Set the averaged model; by default a deep copy of the model in training."""
        if ema_model is None:
            refuse_zero3_model(self.model)
            try:
                ema_model = deepcopy(self.model)
            except Exception as error:
                raise BridgeError(
                    f"the model cannot be copied ({error}): pass ema_model=, a model of the same "
                    "structure or a function that returns one; run lazy modules once first"
                ) from error
        self.ema_model = ema_model() if not isinstance(ema_model, nn.Module) else ema_model
        for parameter in self.ema_model.parameters():
            parameter.detach_()
        self.parameter_names = _find_inexact_names(self.ema_model.named_parameters())
        self.buffer_names = _find_inexact_names(self.ema_model.named_buffers())
        self._names = _plain(self.ema_model)
        self._averagers.clear()

    @property
    def _averaged_model(self) -> nn.Module:
        if self.ema_model is None:
            raise StateError("there is no average before the first update() (lazy_init_ema=True)")
        average: nn.Module = self.ema_model
        return average

    def eval(self) -> Any:
        """Put only the averaged model in evaluation mode, and return it."""
        return self._averaged_model.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged model."""
        return self._averaged_model(*args, **kwargs)

    def restore_ema_model_device(self) -> None:
        """Move the averaged model to the device of this module's buffers."""
        self._averaged_model.to(self.initted.device)

    def get_params_iter(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over a model's float parameters, by name, that the averaged model also has."""
        return (one for one in model.named_parameters() if one[0] in self.parameter_names)

    def get_buffers_iter(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Iterate over a model's float buffers, by name, that the averaged model also has."""
        return (one for one in model.named_buffers() if one[0] in self.buffer_names)

    def _is_ignored(self, name: str) -> bool:
        prefixes = self.ignore_startswith_names
        return name in self.ignore_names or any(name.startswith(prefix) for prefix in prefixes)

    # -- copying and averaging --------------------------------------------------------------------

    def copy_params_from_model_to_ema(self) -> None:
        """Copy the weights into the average, ignored names included.

        Raises the same errors as :meth:`update`.
        """
        self._get_averager(self._averaged_model, self.model, everything=True).copy(self.model)

    def copy_params_from_ema_to_model(self) -> None:
        """Copy the average into the model in training, except integers and booleans.

        Raises the same errors as :meth:`update`.
        """
        self._get_averager(self.model, self._averaged_model, everything=True).copy(
            self._averaged_model
        )

    def _copy_weights(self) -> None:
        self.copy_params_from_model_to_ema()

    def _update_average(self) -> None:
        self.update_moving_average(self.ema_model, self.model)

    def _blend(self, ma_model: nn.Module, current_model: nn.Module, weight: float) -> None:
        """Compute ``ma += weight * (current - ma)``; copy or skip tensors as the names require."""
        if self.move_ema_to_online_device and ma_model is self.ema_model:
            _move_to_device_of(ma_model, current_model)
        averager = self._get_averager(ma_model, current_model, everything=False)
        averager.update(current_model, weight, self._num_steps)

    def _get_averager(
        self, written: nn.Module, read: nn.Module, *, everything: bool
    ) -> ModelAverager:
        """Return the averager that writes one model from the other, cached for these settings."""
        back = written is self.model and written is not self.ema_model
        names = self.param_or_buffer_names_no_ema, self.ignore_names, self.ignore_startswith_names
        settings = *map(set, names), self._rounding
        kept = self._averagers.get((back, everything))
        if kept is not None and kept[0] is written and kept[1] == settings:
            return kept[2]
        both = frozenset(_plain(written)) & frozenset(_plain(read))
        done = partial(self._choose_action, back, everything, both)
        averager = ModelAverager(written, done, rounding=self._rounding)
        self._averagers[back, everything] = written, settings, averager
        return averager

    def _choose_action(
        self, back: bool, everything: bool, both: frozenset[str], plain: str, role: Role
    ) -> Action:
        """Return whether to average, copy or skip a tensor.

        For tied tensors the first name counts, as in the peer.
        """
        name = self._names.get(plain, plain)
        if back and name not in self.parameter_names and name not in self.buffer_names:
            return "skip"
        if self._is_ignored(name) and not (everything and plain in both):
            return "skip"
        if name in self.param_or_buffer_names_no_ema and not everything:
            return "copy"
        return "average"


def _find_inexact_names(named: Iterator[tuple[str, Tensor]]) -> set[str]:
    return {name for name, tensor in named if tensor.is_floating_point() or tensor.is_complex()}


def _plain(model: nn.Module) -> dict[str, str]:
    """Map each name, without wrapper prefixes, to the first name of its tensor."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    first: dict[int, str] = {}
    names = [first.setdefault(id(tensor), name) for name, tensor in named]
    return dict(zip(plain_names([name for name, _ in named]), names, strict=True))


def _move_to_device_of(model: nn.Module, other: nn.Module) -> None:
    """Move ``model`` to the device of ``other`` if the devices differ."""
    ours, theirs = (next(one.parameters(), None) for one in (model, other))
    if ours is not None and theirs is not None and ours.device != theirs.device:
        model.to(theirs.device)
