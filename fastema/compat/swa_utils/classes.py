"""The classes and functions of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import swa_utils as peer
from torch.optim.swa_utils import SWALR

from fastema.bridges.names import plain_names
from fastema.bridges.torch_parts import refuse_zero3_model
from fastema.compat import mirrored
from fastema.compat.averager import ModelAverager
from fastema.compat.mirrored import MirroredNumber
from fastema.compat.shares import check_fraction
from fastema.engine.interrupts import defer_signals
from fastema.errors import LayoutError, format_problems
from fastema.plan import Plan
from fastema.torch import update_bn

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

AvgFn: TypeAlias = Callable[[Tensor, Tensor, Tensor | int], Tensor]
MultiAvgFn: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]
Rounding: TypeAlias = Literal["stochastic", "nearest"]

_NARROW: Final = (torch.float16, torch.bfloat16)

_MOVES: Final = 3
"""Consecutive steps with weights in new memory after which they are no longer kept: they are
copies made for a single step, for example of a model on another device."""

_SPARE_CALLS: Final = 8
"""Number of calls, beyond two per group, for which an unused group is kept."""


# -- update rules ---------------------------------------------------------------------------------


class _UpdateRule:
    """Decay of an update (None for the mean of all weights), and rounding of 16-bit averages."""

    def __init__(self, decay: float | None, rounding: Rounding, seed: int) -> None:
        ModelAverager({}, rounding=rounding, seed=seed)  # validates the arguments now
        self.decay, self.rounding, self.seed = decay, rounding, seed

    def __repr__(self) -> str:
        return "swa" if self.decay is None else f"ema, decay={self.decay}"

    def weight(self, count: int) -> float:
        """Return the weight of the new value after ``increment`` updates."""
        return 1.0 / (count + 1) if self.decay is None else 1.0 - self.decay

    def average(self, averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        """Return the new average of tensors of one wide dtype, without reading the count."""
        if self.decay is None:
            return averaged + (current - averaged) / (count + 1)
        return torch.lerp(averaged, current, 1.0 - self.decay)


def _exponential(decay: float, rounding: Rounding, seed: int) -> _UpdateRule:
    check_fraction(decay, "decay")
    return _UpdateRule(decay, rounding, seed)


# -- functions for an AveragedModel ---------------------------------------------------------------


class _KnownMemory:
    """Tensors that are kept, to recognize their memory under other tensor objects."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]

    def matches(self, others: Sequence[Tensor]) -> bool:
        """Return whether other tensors have the same storages, strides and dtypes."""
        if [other.dtype for other in others] != self._dtypes:
            return False
        try:
            return all(map(Tensor.is_set_to, others, self.tensors))
        except RuntimeError:  # not defined for this layout or device
            return False


class _DeviceGroup:
    """Tensors that are averaged together, under new tensor objects at each step."""

    def __init__(self, averaged: Sequence[Tensor], rule: _UpdateRule) -> None:
        self.averaged = _KnownMemory(averaged)
        self._averager = ModelAverager(
            self.averaged.tensors, rounding=rule.rounding, seed=rule.seed
        )
        self._current: _KnownMemory | None = None
        self._moves = 0
        self.step: int | None = None
        self.last_call = 0

    def update(self, current: Sequence[Tensor], weight: float, step: int) -> None:
        same = self._current is not None and self._current.matches(current)
        found = self._current if same else _KnownMemory(current)
        assert found is not None
        self._averager.update(found.tensors, weight, step)
        self.step, self._current = step, found
        self._moves = 0 if same else self._moves + 1
        if self._moves > _MOVES:
            self._current = None
            self._averager.forget()


class _MultiAverage:
    """Function ``fn(averaged, current, num_averaged)`` that averages lists of tensors in place."""

    def __init__(self, rule: _UpdateRule) -> None:
        self.rule = rule
        self._groups: dict[tuple[object, ...], _DeviceGroup] = {}
        self._count = MirroredNumber()
        self._calls = 0

    def __repr__(self) -> str:
        return f"<multi_avg_fn of fastema: {self.rule!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy it without the memory of any model."""
        return type(self), (self.rule,)

    def __call__(
        self,
        averaged: Sequence[Tensor],
        current: Sequence[Tensor],
        num_averaged: Tensor | int,
    ) -> None:
        if not (averaged and current):
            if len(averaged) != len(current):
                raise LayoutError(f"{len(averaged)} averages cannot follow {len(current)} tensors")
            return
        first, last = averaged[0], averaged[-1]
        key = len(averaged), first.data_ptr(), last.data_ptr(), first.dtype, first.device
        group = self._groups.get(key)
        if group is None or not group.averaged.matches(averaged):
            group = _DeviceGroup(averaged, self.rule)
        step = self._read_step(group, num_averaged)
        group.update(current, self.rule.weight(step), step)
        self._groups[key] = group
        self._calls = group.last_call = self._calls + 1
        self._drop_unused()

    def _read_step(self, group: _DeviceGroup, num_averaged: Tensor | int) -> int:
        if not isinstance(num_averaged, Tensor):
            return int(num_averaged)
        waits = not mirrored.is_always_read(num_averaged)
        if waits and group.step is not None and self.rule.decay is not None:
            return group.step + 1  # only random bits depend on it: do not wait
        return int(self._count.read(num_averaged))

    def _drop_unused(self) -> None:
        """Drop groups whose averages are no longer updated, or have moved."""
        oldest = self._calls - 2 * len(self._groups) - _SPARE_CALLS
        for key in [key for key, group in self._groups.items() if group.last_call < oldest]:
            del self._groups[key]


class _SingleAverage:
    """Function ``fn(averaged, current, num_averaged)`` that returns a new tensor."""

    def __init__(self, rule: _UpdateRule) -> None:
        self.rule = rule
        self._calls = 0

    def __repr__(self) -> str:
        return f"<avg_fn of fastema: {self.rule!r}>"

    @torch.no_grad()
    def __call__(self, averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        if not (averaged.is_floating_point() or averaged.is_complex()):
            return current.clone()
        if averaged.dtype == current.dtype and averaged.dtype not in _NARROW:
            return self.rule.average(averaged, current, num_averaged)
        result = averaged.clone()
        plan = Plan([result], [current], rounding=self.rule.rounding, seed=self.rule.seed)
        plan.calls = self._calls
        plan.lerp_(self.rule.weight(0 if self.rule.decay is not None else int(num_averaged)))
        self._calls += 1
        return result


def get_ema_multi_avg_fn(
    decay: float = 0.999, *, rounding: Rounding = "stochastic", seed: int = 0
) -> MultiAvgFn:
    """Return a function that updates an exponential moving average of tensors in place.

    ``avg += (1 - decay) * (x - avg)``, in one call per list. To recognize both lists again, the
    function keeps their memory alive until several calls have passed without them, or the function
    is deleted.

    Parameters
    ----------
    decay : float
        Weight of the old average, in [0, 1]. Default 0.999.
    rounding : {"stochastic", "nearest"}
        Rounding of 16-bit averages. With ``"stochastic"`` (default), changes below their resolution
        count on average. Not in torch.
    seed : int
        Seed of the random bits, which also depend on the step, the tensor's place in the list, and
        the element's place in the tensor. Default 0. Not in torch.

    Returns
    -------
    callable
        ``fn(averaged, current, num_averaged)``, for ``AveragedModel(multi_avg_fn=...)`` of torch
        or of this module. It can be pickled. Dtypes of the two lists may differ, but torch's
        ``AveragedModel`` refuses float32 with float16 before it calls a function.

    Raises
    ------
    ArgumentError
        If ``decay`` is outside [0, 1] or NaN.
    """
    return _MultiAverage(_exponential(decay, rounding, seed))


def get_swa_multi_avg_fn(*, rounding: Rounding = "stochastic", seed: int = 0) -> MultiAvgFn:
    """Return a function that updates the mean of lists of tensors in place.

    ``avg += (x - avg) / (num_averaged + 1)``; for the parameters see :func:`get_ema_multi_avg_fn`.
    The function waits for a ``num_averaged`` on an accelerator; :class:`AveragedModel` does not.
    Float64 tensors are averaged with a float64 weight; torch's float32 causes errors of 1e-8.
    """
    return _MultiAverage(_UpdateRule(None, rounding, seed))


def get_ema_avg_fn(
    decay: float = 0.999, *, rounding: Rounding = "stochastic", seed: int = 0
) -> AvgFn:
    """Return a function that returns the exponential moving average of one tensor as a new tensor.

    ``decay * avg + (1 - decay) * x``, in the dtype of ``avg``. :func:`get_ema_multi_avg_fn`, which
    has the same parameters, averages a whole model in place, several times as fast; this module's
    :class:`AveragedModel` does so with either function. Random bits depend on the number of calls,
    so a resumed run draws different bits.
    """
    return _SingleAverage(_exponential(decay, rounding, seed))


def get_swa_avg_fn(*, rounding: Rounding = "stochastic", seed: int = 0) -> AvgFn:
    """Return a function that returns the mean of one tensor as a new tensor.

    ``avg + (x - avg) / (num_averaged + 1)``; otherwise see :func:`get_ema_avg_fn`.
    """
    return _SingleAverage(_UpdateRule(None, rounding, seed))


# -- the class ------------------------------------------------------------------------------------

_DEFAULT: Final = _UpdateRule(None, "stochastic", 0)


def _average_parameters(name: str, role: str) -> Literal["average", "copy"]:
    return "copy" if role == "buffer" else "average"


class AveragedModel(peer.AveragedModel):
    """A copy of a model that holds the average of its weights.

    This is a subclass of torch's ``AveragedModel`` (PyTorch 2.13), with its constructor, attributes
    and ``state_dict``: each class loads the other's checkpoints. docs/drop-in.md lists the
    differences.

    The first :meth:`update_parameters` copies the weights; each later one computes
    ``avg += w * (x - avg)`` for all tensors in one call, with ``w = 1 / (n_averaged + 1)`` by
    default and ``1 - decay`` for an exponential moving average.

    Parameters
    ----------
    model : torch.nn.Module
        Model to average; deep-copied to ``module``.
    device : torch.device, str or int, optional
        Device of the average. Default: the model's.
    avg_fn, multi_avg_fn : callable, optional
        ``avg_fn(averaged, current, num_averaged) -> Tensor``, or ``multi_avg_fn`` for lists in
        place. Functions of this module, of either kind, run as above; your own function is called
        as torch calls it.
    use_buffers : bool
        Average floating-point buffers too. If False (default), copy them at each update.

    Attributes
    ----------
    module : torch.nn.Module
        The averaged copy. Cast it, ``averaged.module.to(torch.float32)``, for a float32 average of
        16-bit weights.
    n_averaged : int64 tensor of shape []
        Number of updates so far; random bits depend on it. On an accelerator, a write to it through
        ``.data`` goes unnoticed.

    Raises
    ------
    AssertionError
        If both ``avg_fn`` and ``multi_avg_fn`` are given.

    References
    ----------
    P. Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018,
    https://arxiv.org/abs/1803.05407
    """

    def __init__(
        self,
        model: nn.Module,
        device: int | str | torch.device | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
    ) -> None:
        refuse_zero3_model(model)
        with torch.no_grad():  # a copy of a scripted module: see fastema.compat.averager.copy_model
            super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)  # type: ignore[arg-type]
        self._reset_caches()

    def _reset_caches(self) -> None:
        self._count = MirroredNumber()
        self._cached_averager: tuple[_UpdateRule, bool, ModelAverager] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the attributes that are bound to memory."""
        return {k: v for k, v in vars(self).items() if k not in ("_count", "_cached_averager")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset_caches()

    def update_parameters(self, model: nn.Module) -> None:
        """Update the average from a model, which may be wrapped and on another device.

        Raise a LayoutError, DTypeError or BridgeError that names tensors that do not match or
        cannot be averaged. Nothing is written then.
        """
        rule = self._rule()
        if rule is None:
            _refuse_mismatch(self.module, model)
            super().update_parameters(model)
            return
        count = int(self._count.read(self.n_averaged))
        averager = self._averager(rule)
        with defer_signals():  # an interrupt never separates an update from its count
            if count == 0:
                averager.copy(model)
            else:
                averager.update(model, rule.weight(count), count)
            self._count.increment(self.n_averaged)

    def _rule(self) -> _UpdateRule | None:
        """Return the rule of this module's averaging functions; None for other functions."""
        found = self.avg_fn if self.multi_avg_fn is None else self.multi_avg_fn
        if found is None:
            return _DEFAULT
        return found.rule if isinstance(found, _MultiAverage | _SingleAverage) else None

    def _averager(self, rule: _UpdateRule) -> ModelAverager:
        found = self._cached_averager
        if found is None or found[0] is not rule or found[1] != self.use_buffers:
            policy = None if self.use_buffers else _average_parameters
            averager = ModelAverager(self.module, policy, rounding=rule.rounding, seed=rule.seed)
            self._cached_averager = found = rule, self.use_buffers, averager
        return found[2]


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found |= module.named_buffers(remove_duplicate=False)
    shapes = [list(tensor.shape) for tensor in found.values()]
    return dict(zip(plain_names(list(found)), shapes, strict=True))


def _refuse_mismatch(averaged: nn.Module, model: nn.Module) -> None:
    """Raise a LayoutError if the names or shapes of a model's tensors differ from the average's."""
    ours, theirs = _shapes(averaged), _shapes(model)
    problems = [
        f"{name!r} is {theirs.get(name, 'not')} in the model, "
        f"{ours.get(name, 'not')} in the average"
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]
    if problems:
        raise LayoutError("the model does not match the average:\n" + format_problems(problems))
